-- create_tables: what the service stores, and its outbox: the events that are not on the stream yet
CREATE TABLE prescriptions (
    prescription_id integer PRIMARY KEY,
    patient text NOT NULL,
    medicine text NOT NULL
);
CREATE TABLE outbox (
    outbox_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    prescription_id integer NOT NULL,
    payload text NOT NULL
);

-- insert_prescription: stores a prescription
INSERT INTO prescriptions (prescription_id, patient, medicine) VALUES ($1, $2, $3)

-- insert_event: stores an event that the relay will publish
INSERT INTO outbox (prescription_id, payload) VALUES ($1, $2)

-- next_events: the first events that wait, in order
SELECT outbox_id, prescription_id, payload FROM outbox ORDER BY outbox_id LIMIT 100

-- delete_event: removes an event that the stream has acknowledged
DELETE FROM outbox WHERE outbox_id = $1

-- waiting_events: how many events wait
SELECT count(*) FROM outbox

-- stored_prescriptions: the ids of all prescriptions
SELECT prescription_id FROM prescriptions ORDER BY prescription_id
