-- copy: which copy of the read model this is: a rebuilt one has another table in this one's place
SELECT 'stream_position'::regclass::oid

-- position: how far into the stream that copy is, and of which log epoch
SELECT stream_sequence, stored_at, log_epoch FROM stream_position WHERE tableoid = $1

-- begin: the first position of an empty copy; nothing where there is one already
INSERT INTO stream_position (stream_sequence, stored_at, log_epoch, filling) VALUES ($1, $2, $3, true)
ON CONFLICT DO NOTHING

-- move: the position, if it is still the one before, in the copy that it was read from
UPDATE stream_position SET stream_sequence = $4, stored_at = $5, log_epoch = $6
WHERE stream_sequence = $1 AND stored_at = $2 AND log_epoch = $3 AND tableoid = $7

-- claim: the deployment that a copy belongs to that belonged to none
UPDATE stream_position SET deployment_id = coalesce(deployment_id, $1) WHERE tableoid = $2 RETURNING deployment_id

-- deployment: the one that the copy belongs to; NULL: none yet
SELECT deployment_id FROM stream_position WHERE tableoid = $1

-- filling: whether the copy lacks part of what there was when it began
SELECT filling FROM stream_position WHERE tableoid = $1

-- filled: it lacks nothing of that any more
UPDATE stream_position SET filling = false WHERE tableoid = $1

-- set_aside: takes polls out whose rows cannot be read; the beginning of each row, for the log
DELETE FROM {polls} AS poll WHERE poll_id = ANY ($1::uuid[])
RETURNING poll_id::text, left(to_jsonb(poll)::text, 1000) AS content

-- dead_letters: the events at which polls stand still
SELECT poll_id::text, version, latest, stream_sequence, event_type, error, first_seen, data FROM dead_letters

-- keep_dead_letter: the event at which a poll stands still from now on
INSERT INTO dead_letters (poll_id, version, latest, stream_sequence, event_type, error, first_seen, data)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
ON CONFLICT (poll_id) DO UPDATE SET
    version = excluded.version,
    latest = excluded.latest,
    stream_sequence = excluded.stream_sequence,
    event_type = excluded.event_type,
    error = excluded.error,
    first_seen = excluded.first_seen,
    data = excluded.data

-- drop_dead_letters: these polls go on
DELETE FROM dead_letters WHERE poll_id = ANY ($1::uuid[])

-- report: what the projector of a read model says of itself
INSERT INTO projector_status (read_model, status) VALUES ($1, $2)
ON CONFLICT (read_model) DO UPDATE SET status = excluded.status

-- announce: tells whoever waits for these versions; they hear it once the transaction is committed
SELECT pg_notify($1, announcement) FROM unnest($2::text[]) AS announcement
