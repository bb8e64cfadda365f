#!/bin/sh
# Create a database for MLflow and one for Prefect, each with an owner without access to the other. The PostgreSQL image
# runs this once, when its volume is empty. Passwords come from the environment, not from the arguments of psql.
set -eu
psql --set ON_ERROR_STOP=1 --no-psqlrc --quiet --username postgres --dbname postgres <<'SQL'
\getenv mlflow MLFLOW_DB_PASSWORD
\getenv prefect PREFECT_DB_PASSWORD
CREATE ROLE mlflow LOGIN PASSWORD :'mlflow';
CREATE ROLE prefect LOGIN PASSWORD :'prefect';
CREATE DATABASE mlflow OWNER mlflow;
CREATE DATABASE prefect OWNER prefect;
REVOKE ALL ON DATABASE mlflow, prefect, postgres FROM PUBLIC;
SQL
