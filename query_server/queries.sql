-- poll: a poll as readers see it, without its counts
SELECT poll_id, title, description, option_ids, option_labels, method, state, version, created_at, opened_at, closed_at,
    max_choices, opens_at, closes_at, allow_vote_change, eligibility, results_visibility
FROM polls WHERE poll_id = $1

-- versions: at which version those polls are that exist
SELECT poll_id, version FROM polls WHERE poll_id = ANY ($1::uuid[])

-- polls_page: polls older than a place in the list, newest first
SELECT poll_id, title, description, option_ids, option_labels, method, state, version, created_at, opened_at, closed_at,
    max_choices, opens_at, closes_at, allow_vote_change, eligibility, results_visibility
FROM polls WHERE (created_at, poll_id) < ($1, $2)
ORDER BY created_at DESC, poll_id DESC LIMIT $3

-- polls_page_in_state: the same, of the polls in one state
SELECT poll_id, title, description, option_ids, option_labels, method, state, version, created_at, opened_at, closed_at,
    max_choices, opens_at, closes_at, allow_vote_change, eligibility, results_visibility
FROM polls WHERE (created_at, poll_id) < ($1, $2) AND state = $4
ORDER BY created_at DESC, poll_id DESC LIMIT $3

-- newer_results: the counts of those polls that have a version above the one already known
SELECT poll_id, state, polls.version, option_ids, option_labels, counts, total_votes, as_of,
    eligible_voters, certification, hidden
FROM unnest($1::uuid[], $2::bigint[]) AS known (poll_id, version)
JOIN polls USING (poll_id) WHERE polls.version > known.version

-- vote: a poll's version, and the voter's vote in it, where there is one
SELECT polls.version, votes.version AS vote_version, votes.recorded_at
FROM polls LEFT JOIN votes ON votes.poll_no = polls.poll_no AND votes.voter_key = $2
WHERE poll_id = $1

-- statuses: what the projectors of this database say of themselves
SELECT read_model, status FROM views.projector_status
UNION ALL SELECT read_model, status FROM documents.projector_status
