-- poll: a poll as readers see it, without its counts
SELECT poll_id, title, description, option_ids, option_labels, method, state, version, created_at, opened_at, closed_at,
    max_choices, opens_at, closes_at, allow_vote_change, eligibility, results_visibility
FROM polls WHERE poll_id = $1

-- versions: at which version those polls are that the views have
SELECT poll_id, version FROM polls WHERE poll_id = ANY ($1::uuid[])

-- document_versions: the same of the documents
SELECT poll_id, version FROM documents.documents WHERE poll_id = ANY ($1::uuid[])

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
FROM polls LEFT JOIN votes ON votes.vote_key = encode($2::bytea || int4send(polls.poll_no), 'hex')::uuid
WHERE poll_id = $1

-- statuses: what the projectors of this database say of themselves
SELECT read_model, status FROM views.projector_status
UNION ALL SELECT read_model, status FROM documents.projector_status

-- version: at which version a poll is
SELECT version FROM polls WHERE poll_id = $1

-- poll_no: the number of a poll in this database
SELECT poll_no FROM polls WHERE poll_id = $1

-- voter_votes: a voter's votes in polls that came before a number, the latest first, each with what became of the poll
WITH page AS MATERIALIZED (
    SELECT poll_no, version, recorded_at FROM votes
    WHERE vote_key >= $1 AND vote_key < $2
    ORDER BY vote_key DESC LIMIT $3
)
SELECT poll_id, title, state, outcome, page.version, page.recorded_at
FROM page JOIN polls USING (poll_no)
ORDER BY poll_no DESC

-- turnout_poll: what is known of a poll's turnout without looking at when it was
SELECT poll_no, version, as_of, opened_at, closed_at, total_votes, eligible_voters FROM polls WHERE poll_id = $1

-- turnout: how many voted in each length of time, from $3 to $4; and before all that, with no start
SELECT CASE WHEN start_time >= $3 THEN date_bin(make_interval(secs => $2), start_time, 'epoch') END AS start_time,
    sum(votes)::bigint AS votes
FROM turnout WHERE poll_no = $1 AND start_time < $4
GROUP BY 1

-- document: a poll whole, as another read model of this database has it
SELECT version, document FROM documents.documents WHERE poll_id = $1
