"""The store on S3 and what speaks it: one bucket, through boto3.

`store` is what `objects` knows of it; `address` reads its URL; `upload` and `download` move large values in parts;
`requests` asks, waits and asks again; `errors` says what boto3 raises in our words.
"""
