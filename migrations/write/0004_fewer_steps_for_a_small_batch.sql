-- What a small batch costs the database, by a third less: docs/adr/0004.

-- A row of events or outbox is written only under the lock of its poll's row, by the statement that gives it its version.
-- To look both of them up again, once for each batch, found nothing, and locked what nobody else could change.
ALTER TABLE events DROP CONSTRAINT events_poll_no_fkey;
ALTER TABLE outbox DROP CONSTRAINT outbox_poll_no_version_fkey;

DROP FUNCTION record_votes(integer, bigint, uuid[], bytea[], bytea);
DROP FUNCTION log_votes(integer, bigint, bytea);

-- Records the votes of a small batch, all of voters without a vote, and then its event; a large batch, whose votes are
-- inserted already, comes without ballots. Fails as a whole with unique_violation where a voter has voted, and with TA001
-- where the poll takes no votes.
--
-- Only after the votes the poll's row is locked, until the commit. Here two batches of one poll wait for each other: the
-- lock gives them their versions one after the other; and a command that closes the poll, which takes the same lock, comes
-- before a batch or after it, never between its check and its commit.
CREATE FUNCTION record_votes(
    poll integer, batch_of bigint, ballot_keys uuid[], choices_of bytea[], event bytea,
    OUT version bigint, OUT recorded_at timestamptz
) LANGUAGE plpgsql AS $$
DECLARE
    closes_at timestamptz;
BEGIN
    INSERT INTO votes (batch_id, ballot_key, choices)
    SELECT batch_of, ballot_key, choices FROM unnest(ballot_keys, choices_of) AS vote (ballot_key, choices);
    UPDATE polls
    SET version = polls.version + 1, recorded_at = greatest(polls.recorded_at, clock_timestamp())
    WHERE poll_no = poll AND state = 'OPEN'
    RETURNING polls.version, polls.recorded_at, polls.closes_at INTO version, recorded_at, closes_at;
    IF NOT FOUND OR recorded_at >= closes_at THEN
        RAISE EXCEPTION 'the poll takes no votes' USING ERRCODE = 'TA001';
    END IF;
    INSERT INTO events (poll_no, version, recorded_at, batch_id, payload)
    VALUES (poll, version, recorded_at, batch_of, event);
    INSERT INTO outbox (poll_no, version) VALUES (poll, version);
END
$$;
