-- Who may sign in to the console, and who has.

-- An account reaches what its key reaches, whose secret nobody knows: to end the key is to end the account, and the log
-- of changes names it like any other.
CREATE TABLE accounts (
    name          text        PRIMARY KEY CHECK (name ~ '^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$'),
    key_id        bigint      NOT NULL UNIQUE REFERENCES api_keys,
    password_hash text        NOT NULL,
    created_at    timestamptz NOT NULL DEFAULT now(),
    changed_at    timestamptz NOT NULL DEFAULT now()
);

-- digest: SHA-256 of what the cookie holds.
CREATE TABLE console_sessions (
    digest     bytea       PRIMARY KEY CHECK (octet_length(digest) = 32),
    key_id     bigint      NOT NULL REFERENCES api_keys,
    created_at timestamptz NOT NULL DEFAULT now(),
    used_at    timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL
);
CREATE INDEX console_sessions_key ON console_sessions (key_id);
CREATE INDEX console_sessions_expires_at ON console_sessions (expires_at);

-- A link that signs in once: its row goes when it is used.
CREATE TABLE console_links (
    digest     bytea       PRIMARY KEY CHECK (octet_length(digest) = 32),
    key_id     bigint      NOT NULL REFERENCES api_keys,
    expires_at timestamptz NOT NULL
);

-- No policies, and nothing granted: a tenant's role sees none of these.
ALTER TABLE accounts ENABLE ROW LEVEL SECURITY;
ALTER TABLE console_sessions ENABLE ROW LEVEL SECURITY;
ALTER TABLE console_links ENABLE ROW LEVEL SECURITY;
