-- poll: a poll as readers see it, without its counts. This and what follows returns no row while its read model is being
-- filled, and a row without a poll_id where a full one does not have the poll.
SELECT log_epoch, polls.poll_id, title, description, option_ids, option_labels, method, state, version, created_at,
    opened_at, closed_at, max_choices, opens_at, closes_at, allow_vote_change, eligibility, results_visibility, archived_at
FROM stream_position LEFT JOIN polls ON polls.poll_id = $1 WHERE NOT filling

-- positions: how far those polls are that the views have
SELECT log_epoch, poll_id, version
FROM stream_position LEFT JOIN polls ON poll_id = ANY ($1::uuid[]) WHERE NOT filling

-- document_positions: the same of the documents
SELECT log_epoch, poll_id, version
FROM documents.stream_position LEFT JOIN documents.documents ON poll_id = ANY ($1::uuid[]) WHERE NOT filling

-- polls_page: polls older than a place in the list, newest first
SELECT log_epoch, page.* FROM stream_position LEFT JOIN LATERAL (
    SELECT poll_id, title, description, option_ids, option_labels, method, state, version, created_at, opened_at,
        closed_at, max_choices, opens_at, closes_at, allow_vote_change, eligibility, results_visibility,
        archived_at
    FROM polls WHERE (created_at, poll_id) < ($1, $2)
    ORDER BY created_at DESC, poll_id DESC LIMIT $3
) AS page ON true WHERE NOT filling

-- polls_page_in_state: the same, of the polls in one state
SELECT log_epoch, page.* FROM stream_position LEFT JOIN LATERAL (
    SELECT poll_id, title, description, option_ids, option_labels, method, state, version, created_at, opened_at,
        closed_at, max_choices, opens_at, closes_at, allow_vote_change, eligibility, results_visibility,
        archived_at
    FROM polls WHERE (created_at, poll_id) < ($1, $2) AND state = $4
    ORDER BY created_at DESC, poll_id DESC LIMIT $3
) AS page ON true WHERE NOT filling

-- polls_page_with_prefix: the same, of the polls whose ids are from $4 to $5, in one state or, where $6 is NULL, in any.
-- OFFSET keeps the planner from reading all polls, newest first, for the few that are wanted.
SELECT log_epoch, page.* FROM stream_position LEFT JOIN LATERAL (
    SELECT poll_id, title, description, option_ids, option_labels, method, state, version, created_at, opened_at,
        closed_at, max_choices, opens_at, closes_at, allow_vote_change, eligibility, results_visibility,
        archived_at
    FROM (SELECT * FROM polls WHERE poll_id BETWEEN $4 AND $5 OFFSET 0) AS polls
    WHERE (created_at, poll_id) < ($1, $2) AND ($6::text IS NULL OR state = $6)
    ORDER BY created_at DESC, poll_id DESC LIMIT $3
) AS page ON true WHERE NOT filling

-- newer_results: the counts of those polls that are further than what is known already
SELECT log_epoch, news.* FROM stream_position LEFT JOIN LATERAL (
    SELECT poll_id, state, polls.version, option_ids, option_labels, counts, total_votes, as_of, eligible_voters,
        certification, hidden, total_weight
    FROM unnest($1::uuid[], $2::uuid[], $3::bigint[]) AS known (poll_id, log_epoch, version)
    JOIN polls USING (poll_id)
    WHERE (stream_position.log_epoch, polls.version) > (known.log_epoch, known.version)
) AS news ON true WHERE NOT filling

-- vote: how far a poll is, and whether the voter has a vote in it; not which version counts it: docs/security.md
SELECT log_epoch, poll_id, polls.version, archived_at, votes.vote_key IS NOT NULL AS voted
FROM stream_position LEFT JOIN polls ON poll_id = $1
LEFT JOIN votes ON votes.vote_key = encode($2::bytea || int4send(polls.poll_no), 'hex')::uuid
WHERE NOT filling

-- status: what the projector of the views says of itself
SELECT status FROM projector_status WHERE read_model = $1

-- document_status: the same of the documents
SELECT status FROM documents.projector_status WHERE read_model = $1

-- voter_votes: a voter's votes in polls older than a place in the list, newest first, each with what became of the poll.
-- The list goes by what is the same in every copy of the views, unlike poll_no. OFFSET keeps the planner, which takes a
-- voter to have a part of all votes, from reading all polls for the few that are wanted.
SELECT log_epoch, page.* FROM stream_position LEFT JOIN LATERAL (
    SELECT poll_id, title, state, outcome, created_at, poll.version
    FROM votes, LATERAL (SELECT * FROM polls WHERE polls.poll_no = votes.poll_no OFFSET 0) AS poll
    WHERE vote_key BETWEEN $1 AND $2 AND (created_at, poll_id) < ($3, $4) AND archived_at IS NULL
    ORDER BY created_at DESC, poll_id DESC LIMIT $5
) AS page ON true WHERE NOT filling

-- turnout: a poll with how many voted in each length of time of $2 seconds, from $3 to $4; and before all that, with no
-- start.
SELECT log_epoch, poll_id, version, as_of, opened_at, closed_at, archived_at, total_votes, eligible_voters, chart.*
FROM stream_position LEFT JOIN polls ON poll_id = $1 LEFT JOIN LATERAL (
    SELECT CASE WHEN start_time >= to_timestamp($3) THEN extract(epoch FROM start_time)::bigint / $2 * $2 END
        AS start_seconds, sum(votes)::bigint AS votes
    FROM turnout WHERE turnout.poll_no = polls.poll_no AND start_time < to_timestamp($4)
    GROUP BY 1
) AS chart ON true
WHERE NOT filling

-- document: a poll whole, as another read model of this database has it
SELECT log_epoch, poll_id, version, document
FROM documents.stream_position LEFT JOIN documents.documents ON poll_id = $1 WHERE NOT filling
