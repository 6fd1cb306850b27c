-- voter_secret: the fingerprint of the secret that voters are keyed with, if there is one yet
SELECT fingerprint FROM voter_secret

-- keep_voter_secret: the fingerprint of the first command server's secret; of two at once the key refuses the second one
INSERT INTO voter_secret (fingerprint) VALUES ($1) ON CONFLICT DO NOTHING

-- lock_request: makes calls with one request_id wait for each other, until the transaction ends
SELECT pg_advisory_xact_lock($1)

-- find_request: the first answer to a request_id, where there is one
SELECT fingerprint, response FROM command_requests WHERE request_id = $1

-- remember_request: keeps the answer to a request_id; the primary key refuses a second one
INSERT INTO command_requests (request_id, fingerprint, response) VALUES ($1, $2, $3)

-- forget_requests: removes some of the answers that no repeat may come for any more; how many these were
WITH forgotten AS (
    DELETE FROM command_requests WHERE request_id = ANY (ARRAY(
        SELECT request_id FROM command_requests WHERE recorded_at < now() - interval '7 days' LIMIT $1
    ))
    RETURNING true
)
SELECT count(*) FROM forgotten

-- insert_poll: a new poll with its first event, and the current log epoch
WITH poll AS (
    INSERT INTO polls (poll_id, state, version, spec, opens_at, closes_at, created_at, recorded_at)
    VALUES ($1, $2, 1, $3, $4, $5, clock_timestamp(), clock_timestamp())
    RETURNING poll_no, version, recorded_at
), logged AS (
    INSERT INTO events (poll_no, version, recorded_at, payload)
    SELECT poll_no, version, recorded_at, $6 FROM poll
)
INSERT INTO outbox (poll_no, version) SELECT poll_no, version FROM poll
RETURNING (SELECT log_epoch FROM current_log_epoch)

-- lock_poll: makes every other change of a poll wait until the transaction ends
SELECT poll_no FROM polls WHERE poll_id = $1 FOR UPDATE

-- read_poll: what a decision needs to know of a locked poll, and the time
SELECT state, version, spec, clock_timestamp() AS now, log_epoch
FROM polls, current_log_epoch WHERE poll_no = $1

-- change_poll: a locked poll's next event
WITH poll AS (
    UPDATE polls
    SET state = $2, spec = $3, opens_at = $4, closes_at = $5, version = version + 1,
        recorded_at = greatest(recorded_at, clock_timestamp())
    WHERE poll_no = $1
    RETURNING poll_no, version, recorded_at
), logged AS (
    INSERT INTO events (poll_no, version, recorded_at, payload)
    SELECT poll_no, version, recorded_at, $6 FROM poll
), queued AS (
    INSERT INTO outbox (poll_no, version) SELECT poll_no, version FROM poll
)
SELECT version FROM poll

-- find_poll: what registering voters needs to know of a poll
SELECT poll_no, state, spec FROM polls WHERE poll_id = $1

-- find_polls: what taking votes needs to know of polls; no spec where those before it have a number of bytes already
SELECT poll_id, poll_no, state,
    CASE WHEN coalesce(sum(octet_length(spec)) OVER before, 0) < $2 THEN spec END AS spec
FROM polls WHERE poll_id = ANY ($1::uuid[])
WINDOW before AS (ORDER BY poll_no ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)

-- poll_states: why polls take no votes
SELECT poll_no, state FROM polls WHERE poll_no = ANY ($1::integer[])

-- look_at_polls: how far polls are, and whether no other transaction has locked them
WITH unlocked AS MATERIALIZED (
    SELECT poll_no FROM polls WHERE poll_no = ANY ($1::integer[]) FOR NO KEY UPDATE SKIP LOCKED
)
SELECT poll_no, version, poll_no IN (SELECT poll_no FROM unlocked) AS unlocked
FROM polls WHERE poll_no = ANY ($1::integer[])

-- record_votes: a small batch of new votes with its event, in one round trip
SELECT version, recorded_at, log_epoch FROM record_votes($1, $2, $3, $4, $5)

-- record_keyed_votes: the same, where some votes came with an idempotency key
SELECT version, recorded_at, log_epoch FROM record_keyed_votes($1, $2, $3, $4, $6, $5)

-- record_small_batches: small batches of new votes of several polls with their events, in one round trip
SELECT batch_id, outcome, version, recorded_at, log_epoch FROM record_small_batches($1, $2, $3, $4, $5, $6, $7)

-- log_votes: the event of a batch whose votes are inserted already
SELECT version, recorded_at, log_epoch FROM record_votes($1, $2, '{}', '{}', $3)

-- find_weights: those of these voters that are on the roll
SELECT ballot_key, weight FROM roll WHERE ballot_key = ANY ($1::uuid[])

-- poll_position: how far a poll's log has come
SELECT log_epoch, version FROM polls, current_log_epoch WHERE poll_no = $1

-- replace_votes: the votes of a batch that are new, or do not repeat the voter's vote before with its idempotency key and
-- that one's event is not after a position in the log; with what that one chose. Sorted by key, so that two batches with
-- the same voters wait for each other in one order and never deadlock. Also what is not replaced is locked. An event that
-- was committed after this statement began is not seen, so it is after the position
INSERT INTO votes (batch_id, ballot_key, choices, idempotency_hash)
SELECT $1, vote.* FROM unnest($2::uuid[], $3::bytea[], $6::bytea[]) AS vote (ballot_key, choices, idempotency_hash)
ON CONFLICT (ballot_key) DO UPDATE
SET choices = excluded.choices, batch_id = excluded.batch_id, idempotency_hash = excluded.idempotency_hash
WHERE (votes.choices = excluded.choices AND votes.idempotency_hash = excluded.idempotency_hash) IS NOT TRUE
    AND $4 = (SELECT log_epoch FROM current_log_epoch)
    AND $5 >= (SELECT event.version FROM events AS event WHERE event.batch_id = votes.batch_id)
RETURNING ballot_key, old.choices AS replaced

-- find_votes: what these voters chose, and which event counts it
SELECT vote.ballot_key, vote.choices, vote.idempotency_hash, vote.batch_id, event.version, event.recorded_at,
    log_epoch
FROM votes AS vote
JOIN events AS event USING (batch_id)
CROSS JOIN current_log_epoch
WHERE vote.ballot_key = ANY ($1::uuid[])

-- find_batch: the event of a batch, if it was recorded
SELECT version, recorded_at, payload, log_epoch FROM events, current_log_epoch WHERE batch_id = $1

-- register_voters: adds those voters who are not on the roll yet: how many, and their weight; sorted by key, so that two
-- batches never deadlock
WITH added AS (
    INSERT INTO roll (weight, ballot_key)
    SELECT weight, ballot_key FROM unnest($1::integer[], $2::uuid[]) AS voter (weight, ballot_key)
    ON CONFLICT DO NOTHING
    RETURNING weight
)
SELECT count(*) AS voters, coalesce(sum(weight), 0) AS weight FROM added

-- count_other_weights: how many of these voters are on the roll with another weight
SELECT count(*) FROM unnest($1::integer[], $2::uuid[]) AS voter (weight, ballot_key) JOIN roll USING (ballot_key)
WHERE roll.weight <> voter.weight

-- lead: whether this session is the one that takes care of all polls; it stays so until it ends
SELECT pg_try_advisory_lock($1)

-- due_polls: drafts whose opens_at, and open polls whose closes_at has passed; the most overdue first, and none of those
-- that are left alone
SELECT poll_id, poll_no, opens_at AS due_at FROM polls
WHERE state = 'DRAFT' AND opens_at <= statement_timestamp() AND (closes_at IS NULL OR closes_at > statement_timestamp())
    AND poll_id <> ALL ($1::uuid[])
UNION ALL
SELECT poll_id, poll_no, closes_at FROM polls
WHERE state = 'OPEN' AND closes_at <= statement_timestamp() AND poll_id <> ALL ($1::uuid[])
ORDER BY due_at LIMIT $2

-- advance_polls: opens and closes those of these polls that are due, each with its event; but none that is locked. What is
-- due is looked at again, under the lock: a command may have been faster
WITH due AS MATERIALIZED (
    SELECT poll_no, state FROM polls
    WHERE poll_no = ANY ($1::integer[])
        AND (
            state = 'DRAFT' AND opens_at <= statement_timestamp()
            AND (closes_at IS NULL OR closes_at > statement_timestamp())
            OR state = 'OPEN' AND closes_at <= statement_timestamp()
        )
    ORDER BY poll_no
    FOR NO KEY UPDATE SKIP LOCKED
), poll AS (
    UPDATE polls
    SET state = CASE due.state WHEN 'DRAFT' THEN 'OPEN' ELSE 'CLOSED' END, version = polls.version + 1,
        recorded_at = greatest(polls.recorded_at, clock_timestamp())
    FROM due WHERE polls.poll_no = due.poll_no
    RETURNING polls.poll_id, polls.poll_no, polls.state, polls.version, polls.recorded_at
), logged AS (
    INSERT INTO events (poll_no, version, recorded_at, payload)
    SELECT poll_no, version, recorded_at, CASE state WHEN 'OPEN' THEN $2::bytea ELSE $3::bytea END FROM poll
), queued AS (
    INSERT INTO outbox (poll_no, version) SELECT poll_no, version FROM poll
)
SELECT poll_id, state FROM poll

-- is_unlocked: whether no other transaction has locked a poll
SELECT true FROM polls WHERE poll_no = $1 FOR NO KEY UPDATE SKIP LOCKED

-- request_recount: leaves the recount of a poll to whoever does recounts; one at a time for each poll
INSERT INTO recounts (poll_no) VALUES ($1) ON CONFLICT DO NOTHING RETURNING true

-- next_recount: the recount that has waited longest; none of those polls that are left alone
SELECT poll_id, poll_no, spec, requested_at FROM recounts JOIN polls USING (poll_no)
WHERE poll_id <> ALL ($1::uuid[])
ORDER BY requested_at LIMIT 1

-- end_recount: a recount has its outcome, if no other one had it before
DELETE FROM recounts WHERE poll_no = $1 AND requested_at = $2 RETURNING true

-- recount_votes: a page of the votes between two keys, added up: one row for each different set of choices, with what the
-- roll says that these votes weigh, and the page's last key
WITH page AS (
    SELECT ballot_key, choices FROM votes WHERE ballot_key > $1 AND ballot_key <= $2 ORDER BY ballot_key LIMIT $3
)
SELECT choices, count(*) AS votes, sum(coalesce(weight, 1)) AS roll_weight,
    (SELECT ballot_key FROM page ORDER BY ballot_key DESC LIMIT 1) AS last_key
FROM page LEFT JOIN roll USING (ballot_key)
GROUP BY choices

-- read_events: a page of a poll's log
SELECT version, payload FROM events WHERE poll_no = $1 AND version > $2 ORDER BY version LIMIT $3
