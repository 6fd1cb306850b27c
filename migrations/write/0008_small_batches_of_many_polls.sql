-- Small batches of many polls in one transaction: docs/adr/0019.

-- Records small batches of new votes, one for each of several polls, with their events. A batch that cannot be recorded
-- fails no other; `outcome` says what became of each: 'recorded'; 'repeated' where a voter has voted, or comes twice;
-- 'locked' where another transaction has locked the poll; 'closed' where the poll takes no votes. `batch_of`, `ballot_keys`,
-- `choices_of` and `hashes` have an entry for each ballot, in the order of the keys.
--
-- As in record_votes the polls are locked only after all votes are inserted, until the commit: so whoever holds a poll
-- waits for no vote. They are locked in one order, and none is waited for.
CREATE FUNCTION record_small_batches(
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
            AND (closes_at IS NULL OR closes_at > greatest(recorded_at, moment))
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
