//! Enums whose values have names, as recipes, files, tables and the command line spell them.

/// An enum with `ALL`, `name` (its `Display`) and `named`, and where each value has a second text, `meaning`:
/// a phrase for help.
///
/// ```
/// pkv_core::named! {
///     /// A side of a coin.
///     #[derive(Clone, Copy, Debug, PartialEq)]
///     pub enum Side {
///         Heads = "heads", "the side with a portrait";
///         Tails = "tails", "the other side";
///     }
/// }
/// assert_eq!(Side::ALL.map(Side::name), ["heads", "tails"]);
/// assert_eq!(Side::named("tails"), Some(Side::Tails));
/// assert_eq!(Side::Tails.meaning(), "the other side");
/// ```
#[macro_export]
macro_rules! named {
    ($(#[$of_enum:meta])* pub enum $Name:ident {
        $($(#[$of_value:meta])* $value:ident = $name:literal, $meaning:literal;)+
    }) => {
        $crate::named! {
            $(#[$of_enum])*
            pub enum $Name { $($(#[$of_value])* $value = $name;)+ }
        }

        impl $Name {
            /// In a phrase without its name.
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$value => $meaning,)+ }
            }
        }
    };
    ($(#[$of_enum:meta])* pub enum $Name:ident {
        $($(#[$of_value:meta])* $value:ident = $name:literal;)+
    }) => {
        $(#[$of_enum])*
        pub enum $Name { $($(#[$of_value])* $value,)+ }

        impl std::fmt::Display for $Name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.name())
            }
        }

        impl $Name {
            pub const ALL: [Self; [$($name),+].len()] = [$(Self::$value),+];

            /// As recipes, files and the command line spell it.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$value => $name,)+ }
            }

            /// The one of that name.
            pub fn named(name: &str) -> Option<Self> {
                Self::ALL.into_iter().find(|value| value.name() == name)
            }
        }
    };
}
