-- lead: makes this session the only one that relays a shard, if no other is
SELECT pg_try_advisory_lock($1::integer, $2::integer)

-- next_events: forgets the rows that the stream has acknowledged, and reads the next ones, in order. Rows are chosen by
-- being there, not by a number above the last one: a smaller number may be committed later.
WITH acknowledged AS (
    DELETE FROM outbox WHERE outbox_id = ANY ($1::bigint[])
), pending AS (
    SELECT outbox_id, poll_no, version, again FROM outbox
    WHERE poll_no % $2::integer = $3::integer AND outbox_id <> ALL ($1::bigint[])
    ORDER BY outbox_id LIMIT $4
), sized AS (
    SELECT
        outbox_id, poll_id, pending.version, again, event.recorded_at, payload,
        sum(octet_length(payload)) OVER (ORDER BY outbox_id ROWS UNBOUNDED PRECEDING) AS bytes
    FROM pending JOIN events AS event USING (poll_no, version) JOIN polls USING (poll_no)
)
SELECT outbox_id, poll_id, version, again, recorded_at, payload, (SELECT log_epoch FROM current_log_epoch) FROM sized
-- The first row always fits.
WHERE bytes - octet_length(payload) < $5
ORDER BY outbox_id

-- backlog: how many events wait, for how many seconds the first of those has that were not published before, and the
-- current log epoch
SELECT count(*) AS events, (
    SELECT greatest(extract(epoch FROM clock_timestamp() - recorded_at), 0)::float8
    FROM outbox JOIN events USING (poll_no, version)
    WHERE poll_no % $1::integer = $2::integer AND NOT again ORDER BY outbox_id LIMIT 1
) AS oldest_seconds, (SELECT log_epoch FROM current_log_epoch)
FROM outbox WHERE poll_no % $1::integer = $2::integer

-- current_epoch: the deployment, and its current log epoch
SELECT deployment_id, log_epoch FROM deployment, current_log_epoch

-- lock_epochs: makes others that begin an epoch wait until the transaction ends
LOCK TABLE log_epochs IN SHARE ROW EXCLUSIVE MODE

-- begin_epoch: a new log epoch, greater than the current one and than $2
SELECT begin_log_epoch($1, $2)

-- recorded_at: when some events were recorded, in the order of the arguments; NULL for an event that the log lacks; and
-- whether it may lack it, because the poll was archived since
SELECT event.recorded_at, coalesce(asked.version < polls.snapshot_version, false) AS archived
FROM unnest($1::uuid[], $2::bigint[]) WITH ORDINALITY AS asked (poll_id, version, place)
LEFT JOIN polls USING (poll_id)
LEFT JOIN events AS event ON event.poll_no = polls.poll_no AND event.version = asked.version
ORDER BY place

-- limit_waiting: how long a statement of this transaction waits for a lock
SET LOCAL lock_timeout = '200ms'

-- lock_poll: a poll of this shard, locked so that no event is appended until the transaction ends
SELECT poll_no FROM polls WHERE poll_id = $1 AND poll_no % $2::integer = $3::integer FOR NO KEY UPDATE

-- is_queued: whether a row still waits
SELECT EXISTS (SELECT FROM outbox WHERE outbox_id = $1)

-- queue_again: events of a locked poll, in order, and in any case its latest one, which is the last on the stream then as
-- before. Also those that wait already: only then the new rows, which come behind all others of the poll, hold every
-- version up to its head, and a reader that missed some needs no second attempt.
WITH queued AS (
    INSERT INTO outbox (poll_no, version, again)
    SELECT poll_no, version, true FROM events
    WHERE poll_no = $1
        AND (version BETWEEN $2 AND $3 OR version = (SELECT version FROM polls WHERE poll_no = $1 AND version > $3))
    ORDER BY version
    RETURNING outbox_id, version
)
SELECT max(outbox_id) AS last_outbox_id, max(version) FILTER (WHERE version <= $3) AS last_version, count(*) AS events
FROM queued

-- polls_after: a page of the polls with their latest events, and whether nothing of the poll waits in the outbox
SELECT
    poll_no, poll_id, version, recorded_at,
    NOT EXISTS (SELECT FROM outbox WHERE outbox.poll_no = polls.poll_no) AS settled
FROM polls WHERE poll_no > $1 AND poll_no % $2::integer = $3::integer
ORDER BY poll_no LIMIT $4

-- polls: these polls, as in polls_after
SELECT
    poll_no, poll_id, version, recorded_at,
    NOT EXISTS (SELECT FROM outbox WHERE outbox.poll_no = polls.poll_no) AS settled
FROM polls WHERE poll_no = ANY ($1)
ORDER BY poll_no

-- last_poll_no: how far the numbers of polls go
SELECT coalesce(max(poll_no), 0) FROM polls

-- is_busy: whether more events than this wait in the outbox of a shard
SELECT EXISTS (SELECT FROM outbox WHERE poll_no % $1::integer = $2::integer OFFSET $3 LIMIT 1)

-- queue_heads: the latest event of each of these polls, in order behind all others; how many. A poll that is locked gets
-- an event of its own at this moment.
WITH heads AS (
    SELECT poll_no, version FROM polls WHERE poll_no = ANY ($1) ORDER BY poll_no FOR NO KEY UPDATE SKIP LOCKED
), queued AS (
    INSERT INTO outbox (poll_no, version, again) SELECT poll_no, version, true FROM heads RETURNING true
)
SELECT count(*) FROM queued
