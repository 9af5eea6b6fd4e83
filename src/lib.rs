//! mayfly: a minimal microVM monitor for Linux KVM.
