-- Votes by one key of 16 bytes for voter and poll, instead of one of 16 and one of 4: docs/adr/0008.

ALTER TABLE votes RENAME TO votes_by_voter;
ALTER TABLE votes_by_voter RENAME CONSTRAINT votes_pkey TO votes_by_voter_pkey;

-- One row for each counted vote: answers GetVote and ListVoterVotes. It does not say what was chosen: no reader may ask for
-- that.
CREATE TABLE votes (
    -- The poll's version that counts the vote for the first time.
    version bigint NOT NULL,
    recorded_at timestamptz NOT NULL,
    -- The first 12 bytes of the voter's key, then the poll's poll_no in 4 bytes, high byte first: so a voter's votes lie
    -- together, in the order of their polls. A second row for a voter would mean that an event was applied twice.
    vote_key uuid NOT NULL,
    poll_no integer GENERATED ALWAYS AS (substring(uuid_send(vote_key) FROM 13)::integer) VIRTUAL
);

INSERT INTO votes (version, recorded_at, vote_key)
SELECT version, recorded_at, encode(substring(uuid_send(voter_key) FOR 12) || int4send(poll_no), 'hex')::uuid
FROM votes_by_voter;
ALTER TABLE votes ADD PRIMARY KEY (vote_key);
DROP TABLE votes_by_voter;
