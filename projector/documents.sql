-- tallies: what counting goes on from
SELECT poll_id, version, document, counts FROM documents WHERE poll_id = ANY ($1::uuid[])

-- insert_documents: polls that are new here; the counts come as array literals
INSERT INTO documents (poll_id, version, document, counts)
SELECT poll_id, version, document, counts::bigint[]
FROM unnest($1::uuid[], $2::bigint[], $3::jsonb[], $4::text[]) AS new (poll_id, version, document, counts)
ON CONFLICT DO NOTHING
RETURNING poll_id

-- update_documents: polls that still are at the version before; parts that did not change are not among the new ones
UPDATE documents SET
    version = new.version,
    document = documents.document || new.document,
    counts = new.counts::bigint[]
FROM unnest($1::bigint[], $2::uuid[], $3::bigint[], $4::jsonb[], $5::text[])
    AS new (before, poll_id, version, document, counts)
WHERE documents.poll_id = new.poll_id AND documents.version = new.before
RETURNING documents.poll_id
