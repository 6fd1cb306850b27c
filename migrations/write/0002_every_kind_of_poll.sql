-- Approval polls, vote changes, electoral rolls, opening and closing on time, certification.

ALTER TABLE polls
    DROP CONSTRAINT polls_state_check,
    ADD CONSTRAINT polls_state_check CHECK (state IN ('DRAFT', 'OPEN', 'CLOSED', 'CERTIFIED', 'CANCELLED')),
    -- From the spec, for the clock: when the draft opens by itself, and when the poll takes no more votes.
    ADD COLUMN opens_at timestamptz,
    ADD COLUMN closes_at timestamptz;
-- What the clock has to do next. Neither index has a column that a batch of votes changes.
CREATE INDEX polls_to_open ON polls (opens_at) WHERE state = 'DRAFT' AND opens_at IS NOT NULL;
CREATE INDEX polls_to_close ON polls (closes_at) WHERE state = 'OPEN' AND closes_at IS NOT NULL;

-- The chosen options, ascending: the place of each in the poll's options, from 0, as 2 bytes, high byte first.
ALTER TABLE votes ALTER COLUMN option_no TYPE bytea USING int2send(option_no);
ALTER TABLE votes RENAME COLUMN option_no TO choices;

-- The electoral rolls: who may vote in a poll with eligibility ROLL. Rows are never changed or removed, so a voter who was
-- eligible once is for good. The primary key forbids to register a voter twice, with two weights.
CREATE TABLE roll (
    poll_no integer NOT NULL,
    weight integer NOT NULL CHECK (weight >= 1),
    voter_key uuid NOT NULL,
    PRIMARY KEY (poll_no, voter_key)
);

-- The recounts that were asked for and have not ended. The primary key forbids two at once for one poll.
CREATE TABLE recounts (
    poll_no integer PRIMARY KEY REFERENCES polls,
    requested_at timestamptz NOT NULL DEFAULT now()
);

-- Records the votes of a small batch, all of voters without a vote, with their event: what the command server does for a
-- large batch by COPY, in one round trip. Fails as a whole with unique_violation where a voter has voted, and with the
-- SQLSTATE below where the poll takes no votes.
CREATE FUNCTION record_votes(
    batch_of bigint, poll integer, voter_keys uuid[], choices_of bytea[], event bytea,
    OUT version bigint, OUT recorded_at timestamptz
) LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO votes (batch_id, poll_no, choices, voter_key)
    SELECT batch_of, poll, choices, voter_key FROM unnest(voter_keys, choices_of) AS vote (voter_key, choices);
    SELECT logged.version, logged.recorded_at INTO version, recorded_at FROM log_votes(poll, batch_of, event) AS logged;
END
$$;

-- Appends the event of a batch whose votes are inserted already, if the poll takes votes. Here two batches of one poll
-- wait for each other: the row's lock, held until the commit, gives the batches their versions one after the other; and a
-- command that closes the poll, which takes the same lock, comes before a batch or after it, never between its check and
-- its commit.
CREATE FUNCTION log_votes(poll integer, batch_of bigint, event bytea, OUT version bigint, OUT recorded_at timestamptz)
LANGUAGE plpgsql AS $$
DECLARE
    closes_at timestamptz;
BEGIN
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
