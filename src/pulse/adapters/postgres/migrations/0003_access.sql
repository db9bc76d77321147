-- Who may use the control API, who changed what, and a wall between tenants that holds whatever a statement says.

CREATE TABLE api_keys (
    key_id       bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name         text        NOT NULL,
    tenant_id    text        REFERENCES tenants,
    read_only    boolean     NOT NULL DEFAULT false,
    digest       bytea       NOT NULL UNIQUE CHECK (octet_length(digest) = 32),
    created_at   timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz,
    revoked_at   timestamptz,
    last_used_at timestamptz
);
COMMENT ON COLUMN api_keys.tenant_id IS 'null: an operator''s key, which reaches every tenant';

-- No foreign keys: the record of a change outlives what was changed.
CREATE TABLE audit_log (
    id        bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at        timestamptz NOT NULL DEFAULT now(),
    key_id    bigint,
    actor     text        NOT NULL,
    action    text        NOT NULL,
    tenant_id text,
    target    text        NOT NULL DEFAULT '',
    details   jsonb       NOT NULL DEFAULT '{}'
);
CREATE INDEX audit_log_tenant ON audit_log (tenant_id, id DESC);

-- A transaction for a tenant works as pulse_tenant with the setting pulse.tenant, both by SET LOCAL (pool.py). The owner
-- of the tables, as whom everything else works, is not subject to the policies. Without the setting nothing is seen.
DO $$
DECLARE
    how text := CASE WHEN current_setting('server_version_num')::int >= 160000 THEN 'SET' ELSE 'MEMBER' END;
    way_out text := format(
        'as an administrator of the database: CREATE ROLE pulse_tenant NOLOGIN; GRANT pulse_tenant TO %I;', current_user
    );
BEGIN
    IF to_regrole('pulse_tenant') IS NULL THEN
        BEGIN
            CREATE ROLE pulse_tenant NOLOGIN;
        EXCEPTION
            WHEN insufficient_privilege THEN
                RAISE EXCEPTION 'the role pulse_tenant is missing, and % may not make roles', current_user
                    USING HINT = way_out;
            WHEN duplicate_object OR unique_violation THEN
                NULL; -- another database of this server was quicker
        END;
    END IF;
    IF (SELECT rolsuper OR rolbypassrls FROM pg_roles WHERE rolname = 'pulse_tenant') THEN
        RAISE EXCEPTION 'the role pulse_tenant is not bound by row-level security'
            USING HINT = 'as an administrator of the database: ALTER ROLE pulse_tenant NOSUPERUSER NOBYPASSRLS;';
    END IF;
    IF NOT pg_has_role(current_user, 'pulse_tenant', how) THEN
        BEGIN
            EXECUTE format('GRANT pulse_tenant TO %I', current_user);
        EXCEPTION
            WHEN insufficient_privilege THEN
                RAISE EXCEPTION '% may not work as the role pulse_tenant', current_user USING HINT = way_out;
        END;
    END IF;
    IF NOT has_schema_privilege('pulse_tenant', current_schema(), 'USAGE') THEN
        EXECUTE format('GRANT USAGE ON SCHEMA %I TO pulse_tenant', current_schema());
    END IF;
END
$$;

-- What a tenant's key can do at all. Nothing on api_keys, the ledger, or a single partition of telemetry: through the
-- partitioned table its policy holds, and a partition itself has none.
GRANT SELECT ON tenants, telemetry, device_state, dead_letters TO pulse_tenant;
GRANT SELECT, INSERT, UPDATE ON devices TO pulse_tenant;
GRANT SELECT, INSERT, UPDATE, DELETE ON device_tokens TO pulse_tenant;
GRANT SELECT, INSERT ON audit_log TO pulse_tenant;

ALTER TABLE tenants ENABLE ROW LEVEL SECURITY;
ALTER TABLE devices ENABLE ROW LEVEL SECURITY;
ALTER TABLE device_tokens ENABLE ROW LEVEL SECURITY;
ALTER TABLE telemetry ENABLE ROW LEVEL SECURITY;
ALTER TABLE device_state ENABLE ROW LEVEL SECURITY;
ALTER TABLE dead_letters ENABLE ROW LEVEL SECURITY;
ALTER TABLE api_keys ENABLE ROW LEVEL SECURITY;
ALTER TABLE audit_log ENABLE ROW LEVEL SECURITY;

CREATE POLICY own_tenant ON tenants TO pulse_tenant USING (tenant_id = current_setting('pulse.tenant', true));
CREATE POLICY own_tenant ON devices TO pulse_tenant USING (tenant_id = current_setting('pulse.tenant', true));
CREATE POLICY own_tenant ON device_tokens TO pulse_tenant USING (tenant_id = current_setting('pulse.tenant', true));
CREATE POLICY own_tenant ON telemetry TO pulse_tenant USING (tenant_id = current_setting('pulse.tenant', true));
CREATE POLICY own_tenant ON device_state TO pulse_tenant USING (tenant_id = current_setting('pulse.tenant', true));
CREATE POLICY own_tenant ON dead_letters TO pulse_tenant USING (tenant_id = current_setting('pulse.tenant', true));
CREATE POLICY own_tenant ON audit_log TO pulse_tenant USING (tenant_id = current_setting('pulse.tenant', true));
