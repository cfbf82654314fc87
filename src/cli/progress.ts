/** A line that rewrites itself on a terminal; elsewhere a line every few seconds. */
export class Progress {
  #last = 0
  readonly #terminal = process.stderr.isTTY === true

  constructor(private readonly quiet: boolean) {}

  show(done: number, total: number, what: string): void {
    const now = performance.now()
    if (this.quiet || now - this.#last < (this.#terminal ? 100 : 5000)) return
    this.#last = now
    const line = `${done}/${total} ${what}`
    if (this.#terminal) process.stderr.write(`\r\x1b[2K${line.slice(0, (process.stderr.columns ?? 80) - 1)}`)
    else process.stderr.write(`${line}\n`)
  }

  end(): void {
    if (!this.quiet && this.#terminal) process.stderr.write('\r\x1b[2K')
  }
}
