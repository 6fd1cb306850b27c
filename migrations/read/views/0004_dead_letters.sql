-- Dead letters: the events that could not be applied; see contracts/dead_letters.py for each column. They change in the
-- same transaction as the data and stream_position. The primary key: a poll stands still at one event.
CREATE TABLE dead_letters (
    version bigint NOT NULL,
    latest bigint NOT NULL CHECK (latest >= version),
    stream_sequence bigint NOT NULL,
    first_seen timestamptz NOT NULL,
    poll_id uuid PRIMARY KEY,
    event_type text NOT NULL,
    error text NOT NULL,
    data bytea NOT NULL
);
