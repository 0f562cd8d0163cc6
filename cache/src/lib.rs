//! Digests, a content-addressed store, an action cache and a completion cache over a rebuildable index.
