-- Names one history of the log: docs/adr/0013.

-- The histories of this log; the greatest is the current one. A restore from a backup, or a promoted standby without the
-- last commits, continues a log from an earlier state, which hands out the same versions again with other content: such a
-- log begins a new epoch. Rows are never changed or removed.
CREATE TABLE log_epochs (
    -- A UUID of version 7, so that a later epoch is greater; all zero: the log is older than epochs.
    log_epoch uuid PRIMARY KEY,
    -- Why it began, for an operator.
    reason text NOT NULL,
    begun_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
-- Readers that have an older log keep what they have: only the next history is another one.
INSERT INTO log_epochs (log_epoch, reason)
SELECT CASE WHEN EXISTS (SELECT FROM events) THEN '00000000-0000-0000-0000-000000000000' ELSE uuidv7() END, 'first epoch';

CREATE VIEW current_log_epoch AS SELECT log_epoch FROM log_epochs ORDER BY log_epoch DESC LIMIT 1;

-- Tells two installations apart, which must not share a stream; a backup and a standby have the same.
CREATE TABLE deployment (
    deployment_id uuid NOT NULL,
    -- Forbids a second row.
    one boolean PRIMARY KEY DEFAULT true CHECK (one)
);
INSERT INTO deployment (deployment_id) VALUES (gen_random_uuid());

-- Begins a new history of the log, whose epoch is greater than the current one and than `after`: an epoch that readers may
-- know, although this log does not. Returns it.
CREATE FUNCTION begin_log_epoch(
    reason text, after uuid DEFAULT '00000000-0000-0000-0000-000000000000', OUT log_epoch uuid
) LANGUAGE plpgsql AS $$
DECLARE
    greatest_before uuid;
BEGIN
    -- Two that begin one wait for each other.
    LOCK TABLE log_epochs IN SHARE ROW EXCLUSIVE MODE;
    SELECT greatest(after, current.log_epoch) INTO greatest_before FROM current_log_epoch AS current;
    log_epoch := uuidv7();
    IF log_epoch <= greatest_before THEN
        -- This clock is behind the one that made the epoch before.
        log_epoch := uuidv7(uuid_extract_timestamp(greatest_before) - clock_timestamp() + interval '2 milliseconds');
    END IF;
    IF log_epoch IS NULL OR log_epoch <= greatest_before THEN
        RAISE EXCEPTION 'no epoch can follow %', greatest_before USING ERRCODE = 'invalid_parameter_value';
    END IF;
    INSERT INTO log_epochs (log_epoch, reason) VALUES (begin_log_epoch.log_epoch, begin_log_epoch.reason);
END
$$;

-- Whether the row repeats an event that was published before, for readers that missed it: its age tells nothing of how long
-- events wait.
ALTER TABLE outbox ADD COLUMN again boolean NOT NULL DEFAULT false;

DROP FUNCTION record_votes(integer, bigint, uuid[], bytea[], bytea);

-- As in 0004, and returns the current epoch as well: with the version it names the event.
CREATE FUNCTION record_votes(
    poll integer, batch_of bigint, ballot_keys uuid[], choices_of bytea[], event bytea,
    OUT version bigint, OUT recorded_at timestamptz, OUT log_epoch uuid
) LANGUAGE plpgsql AS $$
DECLARE
    closes_at timestamptz;
BEGIN
    INSERT INTO votes (batch_id, ballot_key, choices)
    SELECT batch_of, ballot_key, choices FROM unnest(ballot_keys, choices_of) AS vote (ballot_key, choices);
    UPDATE polls
    SET version = polls.version + 1, recorded_at = greatest(polls.recorded_at, clock_timestamp())
    WHERE poll_no = poll AND state = 'OPEN'
    RETURNING polls.version, polls.recorded_at, polls.closes_at, (SELECT current.log_epoch FROM current_log_epoch AS current)
    INTO version, recorded_at, closes_at, log_epoch;
    IF NOT FOUND OR recorded_at >= closes_at THEN
        RAISE EXCEPTION 'the poll takes no votes' USING ERRCODE = 'TA001';
    END IF;
    INSERT INTO events (poll_no, version, recorded_at, batch_id, payload)
    VALUES (poll, version, recorded_at, batch_of, event);
    INSERT INTO outbox (poll_no, version) VALUES (poll, version);
END
$$;
