-- position: how far into the stream the read database is
SELECT stream_sequence, stored_at FROM stream_position

-- begin: the first position of a new read database; nothing where there is one already
INSERT INTO stream_position (stream_sequence, stored_at) VALUES ($1, $2) ON CONFLICT DO NOTHING

-- move: the position, if it is still the one before
UPDATE stream_position SET stream_sequence = $3, stored_at = $4 WHERE stream_sequence = $1 AND stored_at = $2

-- tallies: what counting goes on from
SELECT poll_id, version, state, option_ids, option_labels, counts, as_of FROM polls WHERE poll_id = ANY ($1::uuid[])

-- insert_poll: a poll that is new here
INSERT INTO polls (
    poll_id, version, state, method, title, description, option_ids, option_labels, counts, total_votes, as_of,
    created_at, opened_at, closed_at
) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)
ON CONFLICT DO NOTHING
RETURNING poll_id, poll_no

-- update_polls: polls that still are at the version before; the counts come as array literals
UPDATE polls SET
    version = new.version,
    state = new.state,
    counts = new.counts::bigint[],
    total_votes = new.total_votes,
    as_of = new.as_of,
    opened_at = coalesce(new.opened_at, polls.opened_at),
    closed_at = coalesce(new.closed_at, polls.closed_at)
FROM unnest(
    $1::uuid[], $2::bigint[], $3::bigint[], $4::text[], $5::text[], $6::bigint[],
    $7::timestamptz[], $8::timestamptz[], $9::timestamptz[]
) AS new (poll_id, before, version, state, counts, total_votes, as_of, opened_at, closed_at)
WHERE polls.poll_id = new.poll_id AND polls.version = new.before
RETURNING polls.poll_id, polls.poll_no
