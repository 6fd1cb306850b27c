-- left: the copies that rebuilds of a read model have left
SELECT nspname::text FROM pg_namespace WHERE nspname ~ ('^' || $1 || '_[0-9a-f]{8}$')

-- tables: those of a schema
SELECT format('%I.%I', schemaname, tablename) FROM pg_tables WHERE schemaname = $1

-- claim: leaves a schema that nobody uses to whoever drops it. It waits for nobody: to wait with half of the locks could
-- be waiting for a reader that waits for them.
LOCK TABLE {tables} IN ACCESS EXCLUSIVE MODE NOWAIT

-- drop: removes a copy
DROP SCHEMA IF EXISTS {schema} CASCADE

-- ahead: the polls of which the copy in use has a later version than the fresh one, or which only it has
SELECT poll_id::text, in_use.version FROM {in_use}.{polls} AS in_use LEFT JOIN {fresh}.{polls} AS fresh USING (poll_id)
WHERE in_use.version > coalesce(fresh.version, 0)

-- freeze: whoever changes the copy in use waits until the transaction ends; whoever reads it does not
LOCK TABLE {in_use}.stream_position IN SHARE ROW EXCLUSIVE MODE

-- lock_migrations: nobody changes schemas until the transaction ends
SELECT pg_advisory_xact_lock($1)

-- lacking: the migrations that only the copy in use has
SELECT name FROM {in_use}.schema_migrations EXCEPT SELECT name FROM {fresh}.schema_migrations ORDER BY name

-- switch: puts the fresh copy in the place of the one in use. What the projector last said of itself goes with it, so
-- that it is not missing until the projector says it again.
INSERT INTO {fresh}.projector_status (read_model, status)
SELECT read_model, status FROM {in_use}.projector_status ON CONFLICT DO NOTHING;
ALTER SCHEMA {in_use} RENAME TO {retired};
ALTER SCHEMA {fresh} RENAME TO {in_use}
