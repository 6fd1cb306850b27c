-- lead: makes this session the only one that rebuilds a read model, if no other does
SELECT pg_try_advisory_lock($1, hashtext($2))

-- origin: the current history of the log, and the installation that it belongs to
SELECT log_epoch, deployment_id FROM current_log_epoch, deployment

-- size: how many polls there are, and how many events together
SELECT count(*) AS polls, coalesce(sum(version), 0)::bigint AS events FROM polls

-- horizon: from this transaction on, what a transaction changes may be missing in what is read after this statement
SELECT pg_snapshot_xmin(pg_current_snapshot())::xid::text

-- changed_polls: a page of the polls with an event of a transaction from a horizon on, NULL: of all polls. Each event
-- changes its poll's row; by transactions, unlike by times, none can be missed that is committed late.
SELECT poll_no, poll_id, version, recorded_at, snapshot_version FROM polls
WHERE poll_no > $1 AND ($2::text IS NULL OR age(xmin) <= age($2::text::xid))
ORDER BY poll_no LIMIT $3

-- page: the next polls by number; and whether the stream does not have all of their events yet
SELECT
    poll_no, poll_id, version, recorded_at, snapshot_version,
    poll_no IN (SELECT outbox.poll_no FROM outbox) AS waiting
FROM polls WHERE poll_no > $1 ORDER BY poll_no LIMIT $2

-- polls: those of some ids that there are
SELECT poll_no, poll_id, version, recorded_at, snapshot_version FROM polls WHERE poll_id = ANY ($1::uuid[])

-- recorded_at: when certain events were recorded
SELECT poll_no, event.recorded_at
FROM unnest($1::integer[], $2::bigint[]) AS wanted (poll_no, version) JOIN events AS event USING (poll_no, version)

-- events: those of some polls after a version and up to another one, in order, as many as fit into so many bytes
SELECT poll_no, version, recorded_at, payload FROM (
    SELECT
        poll_no, event.version, recorded_at, payload,
        sum(octet_length(payload)) OVER (ORDER BY poll_no, event.version ROWS UNBOUNDED PRECEDING) AS bytes
    FROM unnest($1::integer[], $2::bigint[], $3::bigint[]) AS wanted (poll_no, after, up_to)
    JOIN events AS event USING (poll_no)
    WHERE event.version > wanted.after AND event.version <= wanted.up_to
) AS sized
-- The first one always fits.
WHERE bytes - octet_length(payload) < $4
ORDER BY poll_no, version
