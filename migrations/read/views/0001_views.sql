-- The read database: what readers ask for, ready to be returned. Rebuilt from the event log whenever it is lost.

-- One row answers GetPoll, and GetResults where the live counters have nothing. `version` is the poll's position: the
-- latest event that this row, and the poll's rows in `votes`, contain.
CREATE TABLE polls (
    -- Stands for poll_id in `votes`: 4 bytes instead of 16.
    poll_no integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    poll_id uuid NOT NULL UNIQUE,
    version bigint NOT NULL CHECK (version >= 1),
    state text NOT NULL,
    method text NOT NULL,
    title text NOT NULL,
    description text NOT NULL,
    -- The three arrays run in parallel, one element for each option, in the poll's order.
    option_ids text[] NOT NULL,
    option_labels text[] NOT NULL,
    counts bigint[] NOT NULL,
    total_votes bigint NOT NULL,
    -- When the event `version` was recorded, by the write database's clock.
    as_of timestamptz NOT NULL,
    created_at timestamptz NOT NULL,
    opened_at timestamptz,
    closed_at timestamptz,
    CHECK (cardinality(option_ids) = cardinality(counts) AND cardinality(option_ids) = cardinality(option_labels))
) WITH (fillfactor = 50);
-- ListPolls, with and without a state.
CREATE INDEX polls_newest ON polls (created_at DESC, poll_id DESC);
CREATE INDEX polls_newest_by_state ON polls (state, created_at DESC, poll_id DESC);

-- One row for each counted vote: answers GetVote. It does not say what was chosen: no reader may ask for that.
CREATE TABLE votes (
    -- The poll's version that counts the vote for the first time.
    version bigint NOT NULL,
    recorded_at timestamptz NOT NULL,
    poll_no integer NOT NULL,
    -- Keyed hash of the voter's id.
    voter_key uuid NOT NULL,
    -- A second row for a voter would mean that an event was applied twice.
    PRIMARY KEY (voter_key, poll_no)
);

-- How far into the stream this database is: where to go on reading. It changes in the same transaction as the data.
-- Reading from an earlier place is harmless: `polls.version` tells what is already applied.
CREATE TABLE stream_position (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    -- The last message of the stream that is applied, with all before it.
    stream_sequence bigint NOT NULL,
    -- When the stream stored that message, in microseconds of Unix time. A stream that was made anew, or that lost its
    -- end, has another message in this place; then it is read from its beginning.
    stored_at bigint NOT NULL
);
