-- Routes: which messages go to which webhooks and topics, and how their destinations take them.

-- definition: the route as domain/route.py writes it, the names of its headers with empty values; what stands in columns
-- here counts. json, not jsonb, which would give 1e30 back as an integer of 31 digits. headers: the values, sealed for
-- `route/{tenant_id}/{route_id}`, null where there are none. revision grows with every change, of secrets too.
CREATE TABLE routes (
    tenant_id       text        NOT NULL REFERENCES tenants,
    route_id        text        NOT NULL CHECK (route_id ~ '^[A-Za-z0-9_-]{1,64}$'),
    definition      json        NOT NULL,
    headers         bytea,
    enabled         boolean     NOT NULL DEFAULT true,
    revision        bigint      NOT NULL DEFAULT 1,
    disabled_reason text        NOT NULL DEFAULT '',
    disabled_at     timestamptz,
    created_at      timestamptz NOT NULL DEFAULT now(),
    updated_at      timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, route_id)
);

-- What a webhook signs with, sealed as above; until previous_until with both.
CREATE TABLE route_secrets (
    tenant_id      text        NOT NULL,
    route_id       text        NOT NULL,
    current        bytea       NOT NULL,
    made_at        timestamptz NOT NULL DEFAULT now(),
    previous       bytea,
    previous_until timestamptz,
    PRIMARY KEY (tenant_id, route_id),
    FOREIGN KEY (tenant_id, route_id) REFERENCES routes ON DELETE CASCADE,
    CHECK ((previous IS NULL) = (previous_until IS NULL))
);

-- How the destination is, as the delivery role last told; attempts numbers them.
CREATE TABLE route_health (
    tenant_id       text        NOT NULL,
    route_id        text        NOT NULL,
    circuit         text        NOT NULL DEFAULT 'closed' CHECK (circuit IN ('closed', 'open', 'half_open')),
    attempts        bigint      NOT NULL DEFAULT 0,
    delivered       bigint      NOT NULL DEFAULT 0,
    dead            bigint      NOT NULL DEFAULT 0,
    failures        bigint      NOT NULL DEFAULT 0,
    failing_since   timestamptz,
    last_success_at timestamptz,
    last_failure_at timestamptz,
    updated_at      timestamptz,
    PRIMARY KEY (tenant_id, route_id),
    FOREIGN KEY (tenant_id, route_id) REFERENCES routes ON DELETE CASCADE
) WITH (fillfactor = 70);

-- The last attempts of each route, as many as there are slots (number modulo 100), so that it never grows.
CREATE TABLE route_attempts (
    tenant_id  text        NOT NULL,
    route_id   text        NOT NULL,
    slot       int         NOT NULL CHECK (slot BETWEEN 0 AND 99),
    number     bigint      NOT NULL,
    at         timestamptz NOT NULL,
    webhook_id text        NOT NULL,
    device_id  text        NOT NULL,
    attempt    int         NOT NULL,
    outcome    text        NOT NULL CHECK (outcome IN ('delivered', 'retry', 'dead')),
    status     int,
    failure    text,
    error      text        NOT NULL DEFAULT '',
    elapsed_ms float8      NOT NULL DEFAULT 0,
    excerpt    bytea       NOT NULL DEFAULT '',
    PRIMARY KEY (tenant_id, route_id, slot),
    FOREIGN KEY (tenant_id, route_id) REFERENCES routes ON DELETE CASCADE
) WITH (fillfactor = 70);

-- What the workers made of it, told now and then: jobs, those that found no room in the queue, and messages of which its
-- expression said neither yes nor no. A worker that is killed forgets what it had not told.
CREATE TABLE route_matches (
    tenant_id  text        NOT NULL,
    route_id   text        NOT NULL,
    jobs       bigint      NOT NULL DEFAULT 0,
    no_room    bigint      NOT NULL DEFAULT 0,
    unanswered bigint      NOT NULL DEFAULT 0,
    told_at    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, route_id),
    FOREIGN KEY (tenant_id, route_id) REFERENCES routes ON DELETE CASCADE
) WITH (fillfactor = 70);

GRANT SELECT, INSERT, UPDATE, DELETE ON routes, route_secrets TO pulse_tenant;
GRANT SELECT, INSERT, UPDATE ON route_health TO pulse_tenant;
GRANT SELECT ON route_attempts, route_matches TO pulse_tenant;

ALTER TABLE routes ENABLE ROW LEVEL SECURITY;
ALTER TABLE route_secrets ENABLE ROW LEVEL SECURITY;
ALTER TABLE route_health ENABLE ROW LEVEL SECURITY;
ALTER TABLE route_attempts ENABLE ROW LEVEL SECURITY;
ALTER TABLE route_matches ENABLE ROW LEVEL SECURITY;

CREATE POLICY own_tenant ON routes TO pulse_tenant USING (tenant_id = current_setting('pulse.tenant', true));
CREATE POLICY own_tenant ON route_secrets TO pulse_tenant USING (tenant_id = current_setting('pulse.tenant', true));
CREATE POLICY own_tenant ON route_health TO pulse_tenant USING (tenant_id = current_setting('pulse.tenant', true));
CREATE POLICY own_tenant ON route_attempts TO pulse_tenant USING (tenant_id = current_setting('pulse.tenant', true));
CREATE POLICY own_tenant ON route_matches TO pulse_tenant USING (tenant_id = current_setting('pulse.tenant', true));
