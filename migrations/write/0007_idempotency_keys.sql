-- Who cast a vote can repeat it and learn that it is recorded; others learn nothing of its choice: docs/adr/0016.

-- The hash of the idempotency key that the vote came with, 7 bytes; NULL for a vote without one.
ALTER TABLE votes ADD COLUMN idempotency_hash bytea;

-- record_votes, for a small batch in which some votes came with an idempotency key.
CREATE FUNCTION record_keyed_votes(
    poll integer, batch_of bigint, ballot_keys uuid[], choices_of bytea[], hashes bytea[], event bytea,
    OUT version bigint, OUT recorded_at timestamptz, OUT log_epoch uuid
) LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO votes (batch_id, ballot_key, choices, idempotency_hash)
    SELECT batch_of, vote.* FROM unnest(ballot_keys, choices_of, hashes) AS vote (ballot_key, choices, idempotency_hash);
    SELECT logged.version, logged.recorded_at, logged.log_epoch INTO version, recorded_at, log_epoch
    FROM record_votes(poll, batch_of, '{}', '{}', event) AS logged;
END
$$;
