-- The documents: polls as dashboards and exports take them, each whole in one row. Rebuilt from the event log whenever they
-- are lost.

CREATE TABLE documents (
    poll_id uuid PRIMARY KEY,
    -- The latest event that the document contains.
    version bigint NOT NULL CHECK (version >= 1),
    -- The poll with its options, counts, turnout and outcome; docs/adding-a-read-model.md shows one.
    document jsonb NOT NULL,
    -- What counting goes on from, in the order of the options: the document does not tell it while the counts are hidden.
    counts bigint[] NOT NULL
) WITH (fillfactor = 50);

-- What every read model in this database has, as in views/0001_views.sql, views/0004_dead_letters.sql and
-- views/0005_projector_status.sql: how far into the stream it is, where polls stand still, what its projector says of itself.
CREATE TABLE stream_position (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    stream_sequence bigint NOT NULL,
    stored_at bigint NOT NULL
);

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

CREATE TABLE projector_status (
    read_model text PRIMARY KEY,
    status bytea NOT NULL
) WITH (fillfactor = 50);
