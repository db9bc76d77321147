-- Run by the image once, on an empty volume, by the superuser in the database pulse. Pulse is an ordinary role, which
-- owns its database: row-level security does not hold a superuser.
\getenv password PULSE_DATABASE_PASSWORD
CREATE ROLE pulse LOGIN PASSWORD :'password';
CREATE ROLE pulse_tenant NOLOGIN;
GRANT pulse_tenant TO pulse;
ALTER DATABASE pulse OWNER TO pulse;
