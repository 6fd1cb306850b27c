-- Votes and rolls by one key of 16 bytes for poll and voter, instead of one of 4 and one of 16: docs/adr/0008.

ALTER TABLE votes RENAME TO votes_by_poll;
ALTER TABLE votes_by_poll RENAME CONSTRAINT votes_pkey TO votes_by_poll_pkey;

-- One row for each voter of a poll. The primary key is the rule "one voter, one vote"; nothing else enforces it.
-- No foreign keys: they would cost a look-up for each vote, and rows are only written together with their event.
CREATE TABLE votes (
    batch_id bigint NOT NULL,
    -- The poll's poll_no in 4 bytes, high byte first, then the first 12 bytes of the voter's key.
    ballot_key uuid PRIMARY KEY,
    -- The chosen options, ascending: the place of each in the poll's options, from 0, as 2 bytes, high byte first.
    choices bytea NOT NULL
);

ALTER TABLE roll RENAME TO roll_by_poll;
ALTER TABLE roll_by_poll RENAME CONSTRAINT roll_pkey TO roll_by_poll_pkey;

-- The electoral rolls: who may vote in a poll with eligibility ROLL. Rows are never changed or removed, so a voter who was
-- eligible once is for good. The primary key forbids to register a voter twice, with two weights.
CREATE TABLE roll (
    weight integer NOT NULL CHECK (weight >= 1),
    -- As in votes.
    ballot_key uuid PRIMARY KEY
);

INSERT INTO votes
SELECT batch_id, encode(int4send(poll_no) || substring(uuid_send(voter_key) FOR 12), 'hex')::uuid, choices
FROM votes_by_poll ORDER BY poll_no, voter_key;
INSERT INTO roll
SELECT weight, encode(int4send(poll_no) || substring(uuid_send(voter_key) FOR 12), 'hex')::uuid
FROM roll_by_poll ORDER BY poll_no, voter_key;
DROP TABLE votes_by_poll, roll_by_poll;

DROP FUNCTION record_votes(bigint, integer, uuid[], bytea[], bytea);

-- Records the votes of a small batch, all of voters without a vote, with their event: what the command server does for a
-- large batch by COPY, in one round trip. Fails as a whole with unique_violation where a voter has voted, and with the
-- SQLSTATE of log_votes where the poll takes no votes. The order of the arguments is another one than before: a command
-- server of the version before, which would give the keys of voters for the keys of rows, does not find this function.
CREATE FUNCTION record_votes(
    poll integer, batch_of bigint, ballot_keys uuid[], choices_of bytea[], event bytea,
    OUT version bigint, OUT recorded_at timestamptz
) LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO votes (batch_id, ballot_key, choices)
    SELECT batch_of, ballot_key, choices FROM unnest(ballot_keys, choices_of) AS vote (ballot_key, choices);
    SELECT logged.version, logged.recorded_at INTO version, recorded_at FROM log_votes(poll, batch_of, event) AS logged;
END
$$;
