//! The machine code of the smallest guest: one byte to the serial port, then the end.
//!
//! Every instruction has the same encoding in 32-bit protected mode and in 64-bit mode, so one
//! sequence serves as PVH entry and as 64-bit entry. It touches no memory and no stack.

/// Writes `!` to the serial port with its third instruction, then asks the keyboard
/// controller to reset the machine; halts should that be ignored.
pub const RESET: [u8; 14] = [
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, b'!', // mov al, '!'
    0xee, // out dx, al
    0xb0, 0xfe, // mov al, 0xfe
    0xe6, 0x64, // out 0x64, al
    0xf4, // hlt
    0xeb, 0xfd, // jmp hlt
];
