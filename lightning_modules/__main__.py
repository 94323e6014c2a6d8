from lightning_modules.running import preemption

if __name__ == "__main__":
    preemption.watch()
    from lightning_modules.running.command_line import main

    main()
