-- A poll ends by the clock of this moment, not by the time of its latest event, which may be ahead: docs/adr/0025.
-- compatible: the functions of before with another rule, which servers of the version before get at once.

-- As in 0006. `recorded_at` never falls, so after a forward jump of the clock it is in the future for a while; votes that
-- come meanwhile are counted, with that time, as long as the poll is open by the clock.
CREATE OR REPLACE FUNCTION record_votes(
    poll integer, batch_of bigint, ballot_keys uuid[], choices_of bytea[], event bytea,
    OUT version bigint, OUT recorded_at timestamptz, OUT log_epoch uuid
) LANGUAGE plpgsql AS $$
DECLARE
    is_over boolean;
BEGIN
    INSERT INTO votes (batch_id, ballot_key, choices)
    SELECT batch_of, ballot_key, choices FROM unnest(ballot_keys, choices_of) AS vote (ballot_key, choices);
    UPDATE polls
    SET version = polls.version + 1, recorded_at = greatest(polls.recorded_at, clock_timestamp())
    WHERE poll_no = poll AND state = 'OPEN'
    RETURNING polls.version, polls.recorded_at, polls.closes_at <= clock_timestamp(),
        (SELECT current.log_epoch FROM current_log_epoch AS current)
    INTO version, recorded_at, is_over, log_epoch;
    IF NOT FOUND OR is_over THEN
        RAISE EXCEPTION 'the poll takes no votes' USING ERRCODE = 'TA001';
    END IF;
    INSERT INTO events (poll_no, version, recorded_at, batch_id, payload)
    VALUES (poll, version, recorded_at, batch_of, event);
    INSERT INTO outbox (poll_no, version) VALUES (poll, version);
END
$$;

-- As in 0008, by the same clock.
CREATE OR REPLACE FUNCTION record_small_batches(
    poll_nos integer[], batch_ids bigint[], payloads bytea[], batch_of bigint[], ballot_keys uuid[], choices_of bytea[],
    hashes bytea[]
) RETURNS TABLE (batch_id bigint, outcome text, version bigint, recorded_at timestamptz, log_epoch uuid)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    added_keys uuid[];
    added_batches bigint[];
    repeated bigint[] := '{}';
    unlocked integer[];
    logged_polls integer[];
    logged_versions bigint[];
    logged_times timestamptz[];
    unrecorded bigint[];
    moment timestamptz;
BEGIN
    WITH added AS (
        INSERT INTO votes (batch_id, ballot_key, choices, idempotency_hash)
        SELECT * FROM unnest(batch_of, ballot_keys, choices_of, hashes)
        ON CONFLICT DO NOTHING
        RETURNING batch_id, ballot_key
    )
    SELECT array_agg(ballot_key), array_agg(batch_id) INTO added_keys, added_batches FROM added;
    IF cardinality(added_keys) IS DISTINCT FROM cardinality(ballot_keys) THEN
        repeated := ARRAY(
            SELECT batch FROM unnest(batch_of) AS sent (batch) GROUP BY batch
            EXCEPT ALL
            SELECT batch FROM (
                SELECT batch, count(*) AS votes FROM unnest(batch_of) AS sent (batch) GROUP BY batch
                INTERSECT
                SELECT batch, count(*) FROM unnest(added_batches) AS added (batch) GROUP BY batch
            ) AS whole
        );
    END IF;

    SELECT array_agg(poll_no) INTO unlocked FROM (
        SELECT poll_no FROM polls
        WHERE poll_no IN (
            SELECT poll_no FROM unnest(poll_nos, batch_ids) AS batch (poll_no, batch_id) WHERE batch_id <> ALL (repeated)
        )
        ORDER BY poll_no
        FOR NO KEY UPDATE SKIP LOCKED
    ) AS free;

    moment := clock_timestamp();
    WITH poll AS (
        UPDATE polls
        SET version = version + 1, recorded_at = greatest(recorded_at, moment)
        WHERE poll_no = ANY (unlocked) AND state = 'OPEN'
            AND (closes_at IS NULL OR closes_at > moment)
        RETURNING poll_no, version, recorded_at
    ), logged AS (
        INSERT INTO events (poll_no, version, recorded_at, batch_id, payload)
        SELECT poll_no, version, recorded_at, batch_id, payload
        FROM poll JOIN unnest(poll_nos, batch_ids, payloads) AS batch (poll_no, batch_id, payload) USING (poll_no)
    ), queued AS (
        INSERT INTO outbox (poll_no, version) SELECT poll_no, version FROM poll
    )
    SELECT array_agg(poll_no), array_agg(version), array_agg(recorded_at)
    INTO logged_polls, logged_versions, logged_times FROM poll;

    IF cardinality(logged_polls) IS DISTINCT FROM cardinality(poll_nos) THEN
        -- Only what was added here: a batch that is tried again may have been recorded before.
        unrecorded := ARRAY(
            SELECT batch_id FROM unnest(poll_nos, batch_ids) AS batch (poll_no, batch_id)
            WHERE poll_no <> ALL (coalesce(logged_polls, '{}'))
        );
        DELETE FROM votes USING unnest(added_keys, added_batches) AS added (key, batch)
        WHERE ballot_key = added.key AND added.batch = ANY (unrecorded);
    END IF;

    RETURN QUERY
    SELECT batch.batch_id,
        CASE
            WHEN logged.version IS NOT NULL THEN 'recorded'
            WHEN batch.batch_id = ANY (repeated) THEN 'repeated'
            WHEN batch.poll_no = ANY (unlocked) THEN 'closed'
            ELSE 'locked'
        END,
        logged.version, logged.recorded_at, epoch.log_epoch
    FROM unnest(poll_nos, batch_ids) AS batch (poll_no, batch_id)
    LEFT JOIN unnest(logged_polls, logged_versions, logged_times) AS logged (poll_no, version, recorded_at) USING (poll_no)
    CROSS JOIN current_log_epoch AS epoch;
END
$$;
