/** What the page can ask for, and the messages by which it is done. Types alone: no program has more of another than these. */

export type Target = 'qcow2' | 'raw' | 'vmdk' | 'vhdx' | 'vdi' | 'vpc'

export interface Request {
  readonly source: string
  readonly target: string
  readonly to: Target
  readonly compress: boolean
}

export interface Done {
  readonly virtualSize: number
  readonly bytesWritten: number
  readonly durationMs: number
}

/** An error as it crosses from one process to another: of a `Qcow2Error` only the message would arrive. */
export interface Failure {
  readonly code: string
  readonly message: string
}

/** Exactly one of the two. */
export type Outcome = { readonly done: Done } | { readonly failure: Failure }

/** What the preload script gives to the page as `window.qcow2`. */
export interface Bridge {
  /** The path of a file that was dropped; only the preload script can tell. */
  pathOf(file: File): string
  /** Asks the user; undefined where nothing was chosen. */
  chooseTarget(source: string, to: Target): Promise<string | undefined>
  /** Starts a job. Never rejects. */
  convert(id: number, request: Request, onProgress: (share: number) => void): Promise<Outcome>
  cancel(id: number): void
}

export type ToJobs = { readonly id: number; readonly start: Request } | { readonly id: number; readonly cancel: true }

export type FromJobs =
  | { readonly id: number; readonly progress: number }
  | { readonly id: number; readonly outcome: Outcome }
