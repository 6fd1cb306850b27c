-- lead: makes this session the only one that relays a shard, if no other is
SELECT pg_try_advisory_lock($1::integer, $2::integer)

-- next_events: forgets the rows that the stream has acknowledged, and reads the next ones, in order. Rows are chosen by
-- being there, not by a number above the last one: a smaller number may be committed later.
WITH acknowledged AS (
    DELETE FROM outbox WHERE outbox_id = ANY ($1::bigint[])
), pending AS (
    SELECT outbox_id, poll_no, version FROM outbox
    WHERE poll_no % $2::integer = $3::integer AND outbox_id <> ALL ($1::bigint[])
    ORDER BY outbox_id LIMIT $4
), sized AS (
    SELECT
        outbox_id, poll_id, pending.version, event.recorded_at, payload,
        sum(octet_length(payload)) OVER (ORDER BY outbox_id ROWS UNBOUNDED PRECEDING) AS bytes
    FROM pending JOIN events AS event USING (poll_no, version) JOIN polls USING (poll_no)
)
SELECT outbox_id, poll_id, version, recorded_at, payload FROM sized
-- The first row always fits.
WHERE bytes - octet_length(payload) < $5
ORDER BY outbox_id

-- backlog: how many events wait, and for how many seconds the first of them has
SELECT count(*) AS events, (
    SELECT greatest(extract(epoch FROM clock_timestamp() - recorded_at), 0)::float8
    FROM outbox JOIN events USING (poll_no, version)
    WHERE poll_no % $1::integer = $2::integer ORDER BY outbox_id LIMIT 1
) AS oldest_seconds
FROM outbox WHERE poll_no % $1::integer = $2::integer

-- lock_poll: a poll of this shard, locked so that no event is appended until the transaction ends
SELECT poll_no FROM polls WHERE poll_id = $1 AND poll_no % $2::integer = $3::integer FOR NO KEY UPDATE

-- is_queued: whether a row still waits
SELECT EXISTS (SELECT FROM outbox WHERE outbox_id = $1)

-- queue_again: events of a locked poll, in order. Also those that wait already: only then the new rows, which come
-- behind all others of the poll, hold every version up to its head, and whoever missed some needs no second attempt.
WITH queued AS (
    INSERT INTO outbox (poll_no, version)
    SELECT poll_no, version FROM events WHERE poll_no = $1 AND version BETWEEN $2 AND $3 ORDER BY version
    RETURNING outbox_id, version
)
SELECT max(outbox_id) AS last_outbox_id, max(version) AS last_version FROM queued

-- settled_polls: a page of the polls that changed since some time and of which nothing waits
SELECT poll_no, poll_id, version FROM polls
WHERE poll_no > $1 AND poll_no % $2::integer = $3::integer AND recorded_at >= $4
    AND NOT EXISTS (SELECT FROM outbox WHERE outbox.poll_no = polls.poll_no)
ORDER BY poll_no LIMIT $5

-- queue_heads: the latest event of each of these polls
INSERT INTO outbox (poll_no, version) SELECT poll_no, version FROM polls WHERE poll_no = ANY ($1) FOR NO KEY UPDATE
