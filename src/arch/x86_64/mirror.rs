//! Plain structs in the place of KVM's, which cannot be written to a file: the same members by the
//! same names, and the way there and back.

/// `mirror!(Name of kvm_name { member: type, .. })`: members of KVM's that are left out are 0 on the
/// way back.
macro_rules! mirror {
    ($(#[$doc:meta])* $name:ident of $kvm:ident { $($field:ident: $type:ty),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize,
        )]
        #[serde(deny_unknown_fields)]
        pub struct $name {
            $(pub $field: $type,)+
        }

        impl From<kvm_bindings::$kvm> for $name {
            fn from(kvm: kvm_bindings::$kvm) -> Self {
                $name {
                    $($field: kvm.$field.into(),)+
                }
            }
        }

        impl From<$name> for kvm_bindings::$kvm {
            fn from(state: $name) -> Self {
                let mut kvm = kvm_bindings::$kvm::default();
                $(kvm.$field = state.$field.into();)+
                kvm
            }
        }
    };
}
pub(super) use mirror;
