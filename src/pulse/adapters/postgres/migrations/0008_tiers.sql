-- Where the extension TimescaleDB is in this database, telemetry is a hypertable with a chunk a day; elsewhere it stays
-- partitioned by the day. The columns, indexes, policies and the functions below are the same for both. A table that has
-- rows is left as it is: there is no way from one to the other but copying all of them.
DO $$
DECLARE
    extension_schema text := (
        SELECT nspname FROM pg_extension JOIN pg_namespace ON pg_namespace.oid = extnamespace
        WHERE extname = 'timescaledb'
    );
BEGIN
    IF extension_schema IS NULL OR EXISTS (SELECT FROM telemetry) THEN
        RETURN;
    END IF;
    CREATE TABLE telemetry_new (LIKE telemetry INCLUDING DEFAULTS INCLUDING CONSTRAINTS);
    DROP TABLE telemetry;
    ALTER TABLE telemetry_new RENAME TO telemetry;
    -- Grants on a hypertable reach its chunks, and policies do not. A tenant's role may not even name what is in this schema.
    CREATE SCHEMA pulse_chunks;
    EXECUTE format(
        'SELECT %I.create_hypertable(%L, %L, chunk_time_interval => interval %L,'
        ' create_default_indexes => false, associated_schema_name => %L)',
        extension_schema, 'telemetry', 'ts', '1 day', 'pulse_chunks'
    );
    CREATE INDEX telemetry_device_ts ON telemetry (tenant_id, device_id, ts DESC);
    CREATE INDEX telemetry_position ON telemetry USING brin (position);
    GRANT SELECT ON telemetry TO pulse_tenant;
    ALTER TABLE telemetry ENABLE ROW LEVEL SECURITY;
    CREATE POLICY own_tenant ON telemetry TO pulse_tenant USING (tenant_id = current_setting('pulse.tenant', true));
END
$$;

CREATE FUNCTION telemetry_is_hypertable() RETURNS boolean STABLE LANGUAGE sql AS $$
    SELECT relkind = 'r' FROM pg_class WHERE oid = 'telemetry'::regclass
$$;

-- A hypertable makes its chunks itself.
CREATE OR REPLACE FUNCTION ensure_telemetry_day(day date) RETURNS void LANGUAGE sql AS $$
    SELECT ensure_partition(
        'telemetry', 'telemetry_' || to_char(day, 'YYYYMMDD'),
        day::timestamp AT TIME ZONE 'UTC', (day + 1)::timestamp AT TIME ZONE 'UTC'
    )
    WHERE NOT telemetry_is_hypertable()
$$;

-- The days of telemetry that there are, each with its table.
CREATE FUNCTION telemetry_days() RETURNS TABLE (day date, relation regclass) STABLE LANGUAGE plpgsql AS $$
BEGIN
    IF NOT telemetry_is_hypertable() THEN
        RETURN QUERY
            SELECT to_date(right(relname, 8), 'YYYYMMDD'), inhrelid::regclass
            FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
            WHERE inhparent = 'telemetry'::regclass ORDER BY 1;
    ELSE
        RETURN QUERY
            SELECT (range_start AT TIME ZONE 'UTC')::date, format('%I.%I', chunk_schema, chunk_name)::regclass
            FROM timescaledb_information.chunks
            WHERE hypertable_name = 'telemetry' AND hypertable_schema = current_schema() ORDER BY 1;
    END IF;
END
$$;

-- Takes a day out of telemetry: from then on nobody reads or writes it there, and a row of that day gets a new table.
-- The lock on a partitioned table stops its readers and writers, so this does nothing that takes time: the day's table
-- becomes a child of telemetry_retired, to be counted and dropped later. A chunk cannot be taken out; it is locked, and
-- stays what it was until the caller drops it, in the same transaction.
CREATE FUNCTION retire_telemetry_day(day date, relation regclass) RETURNS regclass LANGUAGE plpgsql AS $$
DECLARE
    retired text := format('telemetry_retired_%s_%s', to_char(day, 'YYYYMMDD'), relation::oid);
BEGIN
    IF telemetry_is_hypertable() THEN
        EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', relation);
        RETURN relation;
    END IF;
    EXECUTE format('ALTER TABLE telemetry DETACH PARTITION %s', relation);
    EXECUTE format('ALTER TABLE %s RENAME TO %I', relation, retired);
    EXECUTE format('ALTER TABLE %I INHERIT telemetry_retired', retired);
    RETURN retired::regclass;
END
$$;

CREATE FUNCTION drop_telemetry_day(day date, relation regclass) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    extension_schema text;
BEGIN
    IF NOT telemetry_is_hypertable() OR EXISTS (
        SELECT FROM pg_inherits WHERE inhrelid = relation AND inhparent = 'telemetry_retired'::regclass
    ) THEN
        EXECUTE format('DROP TABLE %s', relation);
        RETURN;
    END IF;
    SELECT nspname INTO extension_schema FROM pg_extension JOIN pg_namespace ON pg_namespace.oid = extnamespace
    WHERE extname = 'timescaledb';
    EXECUTE format(
        'SELECT %I.drop_chunks(%L, older_than => %L::timestamptz, newer_than => %L::timestamptz)',
        extension_schema, 'telemetry', (day + 1)::timestamp AT TIME ZONE 'UTC', day::timestamp AT TIME ZONE 'UTC'
    );
END
$$;

-- Lets questions about positions skip what was appended since the last call; where a vacuum is at it, it does this itself.
CREATE FUNCTION summarize_positions(low date, high date) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    chosen record;
BEGIN
    FOR chosen IN
        SELECT indrelid::regclass AS relation, indexrelid
        FROM telemetry_days() AS days
        JOIN pg_index ON indrelid = days.relation
        JOIN pg_class ON pg_class.oid = indexrelid
        JOIN pg_am ON pg_am.oid = relam AND amname = 'brin'
        WHERE days.day >= low AND days.day < high
    LOOP
        BEGIN
            EXECUTE format('LOCK TABLE %s IN SHARE UPDATE EXCLUSIVE MODE NOWAIT', chosen.relation);
            PERFORM brin_summarize_new_values(chosen.indexrelid);
        EXCEPTION
            WHEN lock_not_available THEN
                NULL;
        END;
    END LOOP;
END
$$;
