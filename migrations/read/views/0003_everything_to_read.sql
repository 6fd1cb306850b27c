-- Results that are hidden until a poll is closed, what polls came to, and how many voted when.

ALTER TABLE polls
    ADD COLUMN results_visibility text NOT NULL DEFAULT 'LIVE',
    -- Nobody may read the counts: they are shown after the poll is closed, and it is not.
    ADD COLUMN hidden boolean NOT NULL DEFAULT false,
    -- What a closed poll came to: tally.query.v1.Outcome, serialized.
    ADD COLUMN outcome bytea;

-- One row for each 10 s in which somebody voted: answers GetTurnout. A poll of a week has 60,480 rows at most, whatever
-- the number of its votes.
CREATE TABLE turnout (
    poll_no integer NOT NULL,
    -- When the 10 s begin, counted from the beginning of 1970.
    start_time timestamptz NOT NULL,
    -- Voters who voted in this time for the first time in this poll.
    votes bigint NOT NULL CHECK (votes > 0),
    PRIMARY KEY (poll_no, start_time)
) WITH (fillfactor = 80);

-- Nobody wrote down what is new here. An empty read database is filled from the event log again.
TRUNCATE polls, votes, stream_position;
