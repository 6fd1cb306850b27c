-- ended_polls: polls that ended long enough ago to be archived, or whose removal was interrupted; the oldest first
SELECT poll_id FROM polls
WHERE state IN ('CERTIFIED', 'CANCELLED') AND recorded_at < clock_timestamp() - $1::interval
    AND (
        snapshot_version = 0
        OR EXISTS (SELECT FROM events WHERE events.poll_no = polls.poll_no AND events.version < snapshot_version)
    )
ORDER BY recorded_at, poll_id

-- poll: what an archive says of a poll beside its events and votes
SELECT poll_no, state, version, spec, snapshot_version FROM polls WHERE poll_id = $1

-- events: a page of a poll's log
SELECT version, recorded_at, batch_id, payload FROM events
WHERE poll_no = $1 AND version > $2 AND version <= $3 ORDER BY version LIMIT $4

-- votes: a page of the votes between two keys, each with its voter's weight
SELECT ballot_key, choices, batch_id, coalesce(weight, 1) AS weight
FROM votes LEFT JOIN roll USING (ballot_key)
WHERE ballot_key > $1 AND ballot_key <= $2 ORDER BY ballot_key LIMIT $3

-- voters: a page of the electoral roll between two keys
SELECT ballot_key, weight FROM roll WHERE ballot_key > $1 AND ballot_key <= $2 ORDER BY ballot_key LIMIT $3

-- mark_archived: from now on the latest event of a locked poll holds all that the events before it come to
UPDATE polls SET snapshot_version = version WHERE poll_no = $1

-- remove_votes: removes a page of the votes between two keys
DELETE FROM votes WHERE ballot_key = ANY (ARRAY(
    SELECT ballot_key FROM votes WHERE ballot_key > $1 AND ballot_key <= $2 ORDER BY ballot_key LIMIT $3
))

-- remove_voters: removes a page of the electoral roll between two keys
DELETE FROM roll WHERE ballot_key = ANY (ARRAY(
    SELECT ballot_key FROM roll WHERE ballot_key > $1 AND ballot_key <= $2 ORDER BY ballot_key LIMIT $3
))

-- remove_events: removes a page of the events before a locked poll's snapshot, with what waits in the outbox of them. The
-- lock keeps the relay from queueing them again meanwhile.
WITH removed AS (
    DELETE FROM events WHERE poll_no = $1 AND version = ANY (ARRAY(
        SELECT version FROM events WHERE poll_no = $1 AND version < $2 ORDER BY version LIMIT $3
    ))
    RETURNING version
), unqueued AS (
    DELETE FROM outbox WHERE poll_no = $1 AND version < $2
)
SELECT count(*) FROM removed
