-- copy: which copy of the read model this is: a rebuilt one has another table in this one's place
SELECT 'stream_position'::regclass::oid

-- position: how far into the stream that copy is
SELECT stream_sequence, stored_at FROM stream_position WHERE tableoid = $1

-- begin: the first position of an empty copy; nothing where there is one already
INSERT INTO stream_position (stream_sequence, stored_at) VALUES ($1, $2) ON CONFLICT DO NOTHING

-- move: the position, if it is still the one before, in the copy that it was read from
UPDATE stream_position SET stream_sequence = $3, stored_at = $4
WHERE stream_sequence = $1 AND stored_at = $2 AND tableoid = $5

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
