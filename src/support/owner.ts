/** What the parts of an image's interface that live outside its class need of it. */

export interface ImageOwner {
  /** The addon's number of the image. */
  readonly image: number
  /** What `console.log` shows it as. */
  readonly shown: () => Readonly<Record<string, unknown>>
  /** Runs work while the image is kept open. */
  read<T>(work: () => Promise<T>): Promise<T>
  /** As `read`, for work that changes the image: refused, in the name of `what`, for one that is open for reading only. */
  change<T>(what: string, signal: AbortSignal | undefined, work: () => Promise<T>): Promise<T>
  /** Calls `end` when the image is about to close, which waits for work that was begun. What is returned takes that back. */
  onClose(end: () => void): () => void
}

const owners = new WeakMap<object, ImageOwner>()

/** Says what belongs to an image. */
export const setOwner = (image: object, owner: ImageOwner): void => {
  owners.set(image, owner)
}

/** What belongs to an image, if it is one. */
export const ownerOf = (image: object): ImageOwner | undefined => owners.get(image)
