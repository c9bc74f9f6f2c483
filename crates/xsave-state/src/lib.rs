//! xsave-state
