-- Rollups of every number by the minute and by the hour, what is still to be added to them, and what retention has taken.

-- Finds the rows of a batch again, wherever their ts has put them. Positions grow as rows are appended, so the smallest
-- and the largest of each 1 MB say enough: 0.1 µs a row where a btree takes 2.
CREATE INDEX telemetry_position ON telemetry USING brin (position);

-- What rollups do not contain yet: a row is entered by the transaction that settles a batch, and deleted by the one that
-- adds the batch's rows to the rollups. hours: those since 1970 that the rows touch; a question about one of them is
-- answered from the rows.
CREATE TABLE rollup_pending (
    id        bigint         GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    positions int8multirange NOT NULL CHECK (NOT isempty(positions)),
    hours     int4multirange NOT NULL
);

-- Numbers alone: a metric that says something else at times is counted here only where it said a number.
-- sum is exact, whatever the order of addition; last is the value of the greatest (last_ts, last_position).
CREATE TABLE telemetry_minutes (
    tenant_id     text        NOT NULL,
    device_id     text        NOT NULL,
    metric        text        NOT NULL,
    bucket        timestamptz NOT NULL,
    count         bigint      NOT NULL,
    sum           numeric     NOT NULL,
    min           numeric     NOT NULL,
    max           numeric     NOT NULL,
    last          numeric     NOT NULL,
    last_ts       timestamptz NOT NULL,
    last_position bigint      NOT NULL,
    PRIMARY KEY (tenant_id, device_id, metric, bucket)
) PARTITION BY RANGE (bucket);

CREATE TABLE telemetry_hours (LIKE telemetry_minutes INCLUDING ALL) PARTITION BY RANGE (bucket);

-- From when on a series is whole: what was before has been dropped, or may have been in part.
CREATE TABLE storage_horizon (
    series text        PRIMARY KEY CHECK (series IN ('telemetry', 'telemetry_minutes', 'telemetry_hours')),
    since  timestamptz NOT NULL DEFAULT '1970-01-01T00:00Z'
);
INSERT INTO storage_horizon (series) VALUES ('telemetry'), ('telemetry_minutes'), ('telemetry_hours');

-- How many rows of which making of a stream were dropped with their day: the audit adds them to those that are there.
CREATE TABLE telemetry_dropped (
    id         bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    day        date        NOT NULL,
    epoch      int         NOT NULL,
    rows       bigint      NOT NULL,
    dropped_at timestamptz NOT NULL DEFAULT now()
);

-- Days that were taken out of telemetry and are still to be counted and dropped: its children, by inheritance.
CREATE TABLE telemetry_retired (LIKE telemetry);

-- Makes a partition where it is missing. The table is made apart and then attached, because ATTACH takes a lock that
-- lets readers and writers of the other partitions go on; CREATE … PARTITION OF does not.
CREATE FUNCTION ensure_partition(
    parent text, partition text, low timestamptz, high timestamptz, fill_percent int DEFAULT 100
) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF to_regclass(partition) IS NOT NULL THEN
        RETURN;
    END IF;
    -- One at a time; a lock on the table, unlike an advisory one, also shows us what the one before has made.
    EXECUTE format('LOCK TABLE ONLY %I IN SHARE UPDATE EXCLUSIVE MODE', parent);
    IF to_regclass(partition) IS NOT NULL THEN
        RETURN;
    END IF;
    EXECUTE format(
        'CREATE TABLE %I (LIKE %I INCLUDING DEFAULTS INCLUDING CONSTRAINTS) WITH (fillfactor = %s)',
        partition, parent, fill_percent
    );
    EXECUTE format('ALTER TABLE %I ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)', parent, partition, low, high);
END
$$;

CREATE OR REPLACE FUNCTION ensure_telemetry_day(day date) RETURNS void LANGUAGE sql AS $$
    SELECT ensure_partition(
        'telemetry', 'telemetry_' || to_char(day, 'YYYYMMDD'),
        day::timestamp AT TIME ZONE 'UTC', (day + 1)::timestamp AT TIME ZONE 'UTC'
    )
$$;

-- Minutes are kept by the day, hours by the month. An hour is added to many times: room on its page keeps each change
-- out of the index.
CREATE FUNCTION ensure_minutes_of(day date) RETURNS void LANGUAGE sql AS $$
    SELECT ensure_partition(
        'telemetry_minutes', 'telemetry_minutes_' || to_char(day, 'YYYYMMDD'),
        day::timestamp AT TIME ZONE 'UTC', (day + 1)::timestamp AT TIME ZONE 'UTC', 90
    )
$$;

CREATE FUNCTION ensure_hours_of(day date) RETURNS void LANGUAGE sql AS $$
    SELECT ensure_partition(
        'telemetry_hours', 'telemetry_hours_' || to_char(day, 'YYYYMM'),
        date_trunc('month', day::timestamp) AT TIME ZONE 'UTC',
        (date_trunc('month', day::timestamp) + interval '1 month') AT TIME ZONE 'UTC', 70
    )
$$;

ALTER TABLE telemetry_minutes ENABLE ROW LEVEL SECURITY;
ALTER TABLE telemetry_hours ENABLE ROW LEVEL SECURITY;
ALTER TABLE telemetry_retired ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_tenant ON telemetry_minutes TO pulse_tenant USING (tenant_id = current_setting('pulse.tenant', true));
CREATE POLICY own_tenant ON telemetry_hours TO pulse_tenant USING (tenant_id = current_setting('pulse.tenant', true));
CREATE POLICY own_tenant ON telemetry_retired TO pulse_tenant USING (tenant_id = current_setting('pulse.tenant', true));
GRANT SELECT ON telemetry_minutes, telemetry_hours, storage_horizon TO pulse_tenant;
-- Which hours, of anybody's; not whose, and not which messages.
GRANT SELECT (hours) ON rollup_pending TO pulse_tenant;

-- What was settled before there were rollups, in pieces that one transaction can add. Which hours it touched is not
-- known: until it is added, all of them.
INSERT INTO rollup_pending (positions, hours)
SELECT piece, '{[0,)}'
FROM ledger
CROSS JOIN LATERAL generate_series(lower(positions), upper(positions) - 1, 100000) AS low
CROSS JOIN LATERAL (SELECT positions * int8multirange(int8range(low, low + 100000)) AS piece) AS cut
WHERE telemetry_rows > 0 AND NOT isempty(piece)
ORDER BY id, low;
