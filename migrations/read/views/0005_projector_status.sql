-- What the projectors of this database say of themselves, each second, for GetReadModelStatus.

CREATE TABLE projector_status (
    read_model text PRIMARY KEY,
    -- tally.query.v1.GetReadModelStatusResponse, serialized; see contracts/status.py.
    status bytea NOT NULL
) WITH (fillfactor = 50);
