/* The cubins, as they are: NSA_CUBINS is the quoted path of the export's kernels.bin. */
#if defined(__linux__) && defined(__ELF__)
    .section .rodata.nsa_cubins, "a", %progbits
#else
    .section .rdata, "dr"
#endif
    .globl nsa_cubins
#ifdef __ELF__
    .hidden nsa_cubins
#endif
    .balign 64
nsa_cubins:
    .incbin NSA_CUBINS
#if defined(__linux__) && defined(__ELF__)
    .section .note.GNU-stack, "", %progbits
#endif
