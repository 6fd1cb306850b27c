-- Approval polls, vote changes, electoral rolls, opening and closing on time, certification.

ALTER TABLE polls
    ADD COLUMN max_choices integer NOT NULL DEFAULT 0,
    ADD COLUMN opens_at timestamptz,
    ADD COLUMN closes_at timestamptz,
    ADD COLUMN allow_vote_change boolean NOT NULL DEFAULT false,
    ADD COLUMN eligibility text NOT NULL DEFAULT 'OPEN',
    -- Voters on the electoral roll.
    ADD COLUMN eligible_voters bigint NOT NULL DEFAULT 0,
    -- The outcome of the final recount: tally.query.v1.Certification, serialized.
    ADD COLUMN certification bytea;
