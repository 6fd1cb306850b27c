-- Which TALLY_VOTER_SECRET the votes and rolls of this database are keyed with. With another one every voter would be somebody
-- else, and could vote a second time.
CREATE TABLE voter_secret (
    -- Forbids a second row.
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    -- A hash that is keyed with the secret.
    fingerprint bytea NOT NULL
);
