-- lock_request: makes calls with one request_id wait for each other, until the transaction ends
SELECT pg_advisory_xact_lock($1)

-- find_request: the first answer to a request_id, where there is one
SELECT fingerprint, response FROM command_requests WHERE request_id = $1

-- remember_request: keeps the answer to a request_id; the primary key refuses a second one
INSERT INTO command_requests (request_id, fingerprint, response) VALUES ($1, $2, $3)

-- insert_poll: a new poll with its first event
WITH poll AS (
    INSERT INTO polls (poll_id, state, version, spec, created_at, recorded_at)
    VALUES ($1, $2, 1, $3, clock_timestamp(), clock_timestamp())
    RETURNING poll_no, version, recorded_at
), logged AS (
    INSERT INTO events (poll_no, version, recorded_at, payload)
    SELECT poll_no, version, recorded_at, $4 FROM poll
)
INSERT INTO outbox (poll_no, version) SELECT poll_no, version FROM poll

-- lock_poll: a poll's state, locked against every other change until the transaction ends
SELECT poll_no, state FROM polls WHERE poll_id = $1 FOR UPDATE

-- change_poll: a locked poll's next event
WITH poll AS (
    UPDATE polls
    SET state = $2, version = version + 1, recorded_at = greatest(recorded_at, clock_timestamp())
    WHERE poll_no = $1
    RETURNING poll_no, version, recorded_at
), logged AS (
    INSERT INTO events (poll_no, version, recorded_at, payload)
    SELECT poll_no, version, recorded_at, $3 FROM poll
), queued AS (
    INSERT INTO outbox (poll_no, version) SELECT poll_no, version FROM poll
)
SELECT version FROM poll

-- find_poll: what taking votes needs to know of a poll
SELECT poll_no, state, spec FROM polls WHERE poll_id = $1

-- poll_state: why a poll takes no votes
SELECT state FROM polls WHERE poll_no = $1

-- log_votes: the event of a batch whose votes are inserted already, if the poll is open. Here two batches of one poll
-- wait for each other: the row's lock, held until the commit, gives the batches their versions one after the other,
-- and ClosePoll, which takes the same lock, comes before a batch or after it, never between its check and its commit.
WITH poll AS (
    UPDATE polls
    SET version = version + 1, recorded_at = greatest(recorded_at, clock_timestamp())
    WHERE poll_no = $1 AND state = 'OPEN'
    RETURNING poll_no, version, recorded_at
), logged AS (
    INSERT INTO events (poll_no, version, recorded_at, batch_id, payload)
    SELECT poll_no, version, recorded_at, $2, $3 FROM poll
), queued AS (
    INSERT INTO outbox (poll_no, version) SELECT poll_no, version FROM poll
)
SELECT version, recorded_at FROM poll

-- insert_new_votes: the votes of a batch whose voters have none yet; sorted by key, so that two batches with the same
-- voters wait for each other in one order and never deadlock
INSERT INTO votes (batch_id, poll_no, option_no, voter_key)
SELECT $1, $2, option_no, voter_key FROM unnest($3::uuid[], $4::smallint[]) AS vote (voter_key, option_no)
ON CONFLICT DO NOTHING
RETURNING voter_key

-- find_votes: what these voters chose, and which event counts it
SELECT vote.voter_key, vote.option_no, vote.batch_id, event.version, event.recorded_at
FROM votes AS vote
JOIN events AS event USING (batch_id)
WHERE vote.poll_no = $1 AND vote.voter_key = ANY ($2::uuid[])
