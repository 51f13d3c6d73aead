"""The registry on the Hugging Face Hub: one model repository an adapter, a tag a version, a branch for its channels.

`registry` is `base.Registry` over it, with `publish`, `reader` and `state` below; `client` is the only file that speaks
HTTP; `layout` names what lies in a repository, `card` writes its README, `log` its history; `imports` brings the
adapters of others.
"""
