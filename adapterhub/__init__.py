"""AdapterHub: LoRA adapters from training to serving.

    ah train   ->  an adapter directory          adapterhub.trainers
    ah publish ->  acme/support@1, immutable     adapterhub.registry
    ah serve   ->  one base, many tenants        adapterhub.serving
    ah export  ->  a standalone model, proven    adapterhub.export

The words that all four share are `refs`, `manifest`, `peftdir`, `base` and `errors`. Cheap to import.
"""

__version__ = "0.1.0"
