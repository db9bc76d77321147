-- Who may speak. Ids and digests are checked here too: what stands here is projected to the edge.

CREATE TABLE tenants (
    tenant_id  text PRIMARY KEY CHECK (tenant_id ~ '^[A-Za-z0-9_-]{1,64}$'),
    name       text NOT NULL DEFAULT '',
    enabled    boolean NOT NULL DEFAULT true,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE devices (
    tenant_id  text NOT NULL REFERENCES tenants,
    device_id  text NOT NULL CHECK (device_id ~ '^[A-Za-z0-9_-]{1,64}$'),
    name       text NOT NULL DEFAULT '',
    enabled    boolean NOT NULL DEFAULT true,
    attributes jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(attributes) = 'object'),
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, device_id)
);

-- A token is looked up through its device, which the sender names: one index serves that, paging and uniqueness.
CREATE TABLE device_tokens (
    tenant_id  text NOT NULL,
    device_id  text NOT NULL,
    digest     bytea NOT NULL CHECK (octet_length(digest) = 32),
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    PRIMARY KEY (tenant_id, device_id, digest),
    FOREIGN KEY (tenant_id, device_id) REFERENCES devices ON DELETE CASCADE
);
