//! vcpu-realloc
