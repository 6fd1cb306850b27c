-- tallies: what counting goes on from
SELECT poll_id, version, state, option_ids, option_labels, counts, total_votes, as_of, eligible_voters, certification,
    hidden, total_weight
FROM polls WHERE poll_id = ANY ($1::uuid[])

-- insert_poll: a poll that is new here; the first twelve are those of update_spec
INSERT INTO polls (
    poll_id, title, description, method, option_ids, option_labels, max_choices, opens_at, closes_at, allow_vote_change,
    eligibility, results_visibility, version, state, counts, total_votes, as_of, created_at, opened_at, closed_at,
    eligible_voters, certification, hidden, outcome, total_weight, archived_at
) VALUES (
    $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22, $23, $24, $25, $26
)
ON CONFLICT DO NOTHING
RETURNING poll_id, poll_no

-- update_spec: what a poll is
UPDATE polls SET
    title = $2, description = $3, method = $4, option_ids = $5, option_labels = $6, max_choices = $7, opens_at = $8,
    closes_at = $9, allow_vote_change = $10, eligibility = $11, results_visibility = $12,
    -- A draft has no votes; its options may be others now.
    counts = CASE
        WHEN cardinality(counts) = cardinality($5::text[]) THEN counts
        ELSE array_fill(0::bigint, ARRAY[cardinality($5::text[])])
    END
WHERE poll_id = $1

-- update_polls: polls that still are at the version before; the counts come as array literals
UPDATE polls SET
    version = new.version,
    state = new.state,
    counts = new.counts::bigint[],
    total_votes = new.total_votes,
    as_of = new.as_of,
    opened_at = coalesce(new.opened_at, polls.opened_at),
    closed_at = coalesce(new.closed_at, polls.closed_at),
    eligible_voters = new.eligible_voters,
    certification = new.certification,
    hidden = new.hidden,
    outcome = new.outcome,
    total_weight = new.total_weight,
    archived_at = new.archived_at
FROM unnest(
    $1::uuid[], $2::bigint[], $3::bigint[], $4::text[], $5::text[], $6::bigint[],
    $7::timestamptz[], $8::timestamptz[], $9::timestamptz[], $10::bigint[], $11::bytea[], $12::boolean[], $13::bytea[],
    $14::bigint[], $15::timestamptz[]
) AS new (
    poll_id, before, version, state, counts, total_votes, as_of, opened_at, closed_at, eligible_voters, certification,
    hidden, outcome, total_weight, archived_at
)
WHERE polls.poll_id = new.poll_id AND polls.version = new.before
RETURNING polls.poll_id, polls.poll_no

-- replace_votes: the votes of an event, each in the place of the voter's earlier one
INSERT INTO votes (version, recorded_at, vote_key) SELECT $1, $2, unnest($3::uuid[])
ON CONFLICT (vote_key) DO UPDATE SET version = excluded.version, recorded_at = excluded.recorded_at

-- add_turnout: voters who voted for the first time, by poll and time
INSERT INTO turnout (poll_no, start_time, votes)
SELECT poll_no, start_time, votes
FROM unnest($1::integer[], $2::timestamptz[], $3::bigint[]) AS new (poll_no, start_time, votes)
ON CONFLICT (poll_no, start_time) DO UPDATE SET votes = turnout.votes + excluded.votes

-- remove_turnout: polls that are archived have no turnout over time any longer
DELETE FROM turnout WHERE poll_no = ANY ($1::integer[])
