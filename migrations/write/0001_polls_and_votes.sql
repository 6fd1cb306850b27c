-- The write database: the truth. Everything else can be rebuilt from `events`.

-- A poll and where it is in its life. The row's lock is what gives a poll's events their total order.
CREATE TABLE polls (
    -- Stands for poll_id in the big tables: 4 bytes instead of 16.
    poll_no integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    poll_id uuid NOT NULL UNIQUE,
    state text NOT NULL CHECK (state IN ('DRAFT', 'OPEN', 'CLOSED')),
    -- The version of the poll's latest event.
    version bigint NOT NULL CHECK (version >= 1),
    -- tally.poll.v1.PollSpec, serialized.
    spec bytea NOT NULL,
    created_at timestamptz NOT NULL,
    -- When that event was recorded. Never falls, whatever the clock does.
    recorded_at timestamptz NOT NULL
-- Each batch of votes updates this row: room in the page keeps the update off the indexes (HOT).
) WITH (fillfactor = 50);

-- The event log. The primary key forbids two events with one version; events are appended only under the lock of their
-- poll's row, by one statement that also takes the next version, so there are no gaps.
CREATE TABLE events (
    poll_no integer NOT NULL REFERENCES polls,
    version bigint NOT NULL CHECK (version >= 1),
    recorded_at timestamptz NOT NULL,
    -- The votes of this event carry the same number. NULL for events without votes.
    batch_id bigint,
    -- tally.event.v1.Event, serialized, with only its `change` set: the other fields are the columns above.
    payload bytea NOT NULL,
    PRIMARY KEY (poll_no, version)
);
-- Payloads are keyed hashes mostly: trying to compress them is wasted work.
ALTER TABLE events ALTER COLUMN payload SET STORAGE EXTERNAL;
-- From a vote to the event that counts it. Forbids two events for one batch.
CREATE UNIQUE INDEX events_batch_id ON events (batch_id) WHERE batch_id IS NOT NULL;

-- One row for each voter of a poll. The primary key is the rule "one voter, one vote"; nothing else enforces it.
-- No foreign keys: they would cost a look-up for each vote, and rows are only written together with their event.
CREATE TABLE votes (
    batch_id bigint NOT NULL,
    poll_no integer NOT NULL,
    -- The chosen option: its place in the poll's options, from 0.
    option_no smallint NOT NULL,
    -- Keyed hash of the voter's id: 16 bytes, which uuid stores in 16.
    voter_key uuid NOT NULL,
    PRIMARY KEY (poll_no, voter_key)
);

-- Events that the stream has not acknowledged yet. The relay publishes by outbox_id and deletes after the ack. Within a
-- poll, outbox_id has the order of the versions, because rows are inserted under the lock of the poll's row.
CREATE TABLE outbox (
    outbox_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    poll_no integer NOT NULL,
    version bigint NOT NULL,
    FOREIGN KEY (poll_no, version) REFERENCES events
-- The table is a queue: always small, always changing. Vacuum by change, not by size.
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);

-- The answers to commands that carried a request_id. The primary key forbids to run one command twice.
CREATE TABLE command_requests (
    request_id uuid PRIMARY KEY,
    -- Hash of the command and its body, to tell a repeat from another command under the same id.
    fingerprint bytea NOT NULL,
    -- The serialized response that the first call returned.
    response bytea NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT now()
);
