-- Telemetry, and the ledger that makes storing it exactly once.

-- One making of a stream: a stream that was deleted and made again counts its sequences from 1 once more.
-- first_seq and last_seq are what was last seen of it, so that what it accepted is known after it is gone.
CREATE TABLE stream_epochs (
    epoch       int         PRIMARY KEY CHECK (epoch BETWEEN 1 AND 131071),
    stream      text        NOT NULL,
    created_ns  bigint      NOT NULL,
    first_seq   bigint      NOT NULL DEFAULT 1,
    last_seq    bigint      NOT NULL DEFAULT 0,
    seen_at     timestamptz NOT NULL DEFAULT now(),
    UNIQUE (stream, created_ns)
);

-- Each row is one transaction's word on a set of positions (epoch << 46 | sequence). The exclusion makes it
-- impossible to settle a position twice, whatever is redelivered and however many workers race.
-- positions: all that the row settles; dead: those of them that became dead letters; telemetry_rows: rows written.
CREATE TABLE ledger (
    id             bigint         GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    positions      int8multirange NOT NULL CHECK (NOT isempty(positions)),
    dead           int8multirange NOT NULL DEFAULT '{}' CHECK (positions @> dead),
    telemetry_rows bigint         NOT NULL,
    settled_at     timestamptz    NOT NULL DEFAULT now(),
    EXCLUDE USING gist (positions WITH &&)
);

-- No unique index on position: the ledger is what keeps a position from being stored twice, at no cost a row.
CREATE TABLE telemetry (
    ts         timestamptz NOT NULL,
    tenant_id  text        NOT NULL,
    device_id  text        NOT NULL,
    seq        bigint,
    site_id    text,
    metrics    jsonb       NOT NULL,
    position   bigint      NOT NULL
) PARTITION BY RANGE (ts);

CREATE INDEX telemetry_device_ts ON telemetry (tenant_id, device_id, ts DESC);

-- Makes the partition of one UTC day where it is missing. The table is made apart and then attached, because
-- ATTACH takes a lock that lets readers and writers of the other partitions go on; CREATE … PARTITION OF does not.
CREATE FUNCTION ensure_telemetry_day(day date) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    partition text := 'telemetry_' || to_char(day, 'YYYYMMDD');
BEGIN
    IF to_regclass(partition) IS NOT NULL THEN
        RETURN;
    END IF;
    -- One at a time; a lock on the table, unlike an advisory one, also shows us what the one before has made.
    LOCK TABLE telemetry IN SHARE UPDATE EXCLUSIVE MODE;
    IF to_regclass(partition) IS NOT NULL THEN
        RETURN;
    END IF;
    EXECUTE format('CREATE TABLE %I (LIKE telemetry INCLUDING DEFAULTS INCLUDING CONSTRAINTS)', partition);
    EXECUTE format(
        'ALTER TABLE telemetry ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
        partition, day::timestamp AT TIME ZONE 'UTC', (day + 1)::timestamp AT TIME ZONE 'UTC'
    );
END
$$;

CREATE TABLE device_state (
    tenant_id text        NOT NULL,
    device_id text        NOT NULL,
    last_seen timestamptz NOT NULL,
    PRIMARY KEY (tenant_id, device_id)
) WITH (fillfactor = 70);

-- Whole messages that could not be processed. tenant_id and device_id are null where the envelope was unreadable.
CREATE TABLE dead_letters (
    id           bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    stream       text        NOT NULL,
    position     bigint      NOT NULL UNIQUE,
    subject      text        NOT NULL,
    tenant_id    text,
    device_id    text,
    reason       text        NOT NULL,
    error        text        NOT NULL,
    headers      bytea       NOT NULL,
    body         bytea       NOT NULL,
    attempts     int         NOT NULL,
    published_at timestamptz NOT NULL,
    died_at      timestamptz NOT NULL DEFAULT now()
);

CREATE INDEX dead_letters_died_at ON dead_letters (died_at DESC);
